"""Experiments that differ in one setting: run them, then make a table and a figure of them.

`python -m tools.sweep NAME`, a name in tools/sweeps.yaml, queues and runs experiments named
NAME-..., prints the mean and the range of their accuracies, and writes docs/NAME.csv, a line for
each experiment, and docs/NAME.png. With --table it takes those that have run.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import dvc.api
import numpy as np
import yaml
from dvc.utils.flatten import flatten
from tabulate import tabulate

from transfer import figures
from transfer.common.errors import InputError, exit_cleanly
from transfer.common.files import write_csv
from transfer.common.paths import COST, training_path
from transfer.common.run import refuse_lost_experiment
from transfer.common.settings import MODES

DOCS = Path("docs")


SWEEPS = yaml.safe_load(Path(__file__).with_name("sweeps.yaml").read_text(encoding="utf-8"))
# The lines of a figure, in this order: name -> x -> the accuracies of the runs there.
Lines = dict[str, dict[float, list[float]]]
STYLES = {mode: (figures.COLOURS[mode], figures.MARKERS[mode]) for mode in MODES}
STYLES["from scratch"] = ("#009E73", "^")


def run(name: str) -> None:
    """Queue and run the experiments of the sweep `name`, in temporary copies of the last commit.

    Raises InputError where they would be others than those: with other settings, or lost.
    """
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "params.yaml"]).returncode
    if changed:
        raise InputError(
            "params.yaml: differs from the last commit, so all experiments would: commit it, or "
            "run git restore params.yaml"
        )
    refuse_lost_experiment()
    sweep = SWEEPS[name]
    experiment = [sys.executable, "-m", "dvc", "exp", "run"]
    commands = [
        ["--queue", f"--name={name}-{number}", *(f"-S{key}={grid[key]}" for key in grid)]
        for number, grid in enumerate(sweep["grids"])
    ]
    for options in (*commands, ["--run-all", "--jobs", str(sweep.get("jobs", 1))]):
        if subprocess.run([*experiment, *options]).returncode:
            raise InputError(
                f"dvc exp run {' '.join(options)} failed; its own message stands above. Earlier "
                f"experiments named {name}-... must be removed with dvc exp remove, or take --table"
            )


def read_json(path: Path, rev: str) -> dict[str, Any]:
    return json.loads(dvc.api.read(path.as_posix(), rev=rev, encoding="utf-8"))


def experiments(name: str) -> list[dict[str, Any]]:
    """A row for each experiment that has run: the sweep's columns, seed, weights, results.

    Raises InputError if one of them has not ended well, or differs from the commit in a setting
    that the sweep does not change.
    """
    columns = SWEEPS[name]["columns"]
    changed = {key for grid in SWEEPS[name]["grids"] for key in grid}
    committed = flatten(dvc.api.params_show(rev="HEAD"))
    rows = []
    for found in dvc.api.exp_show():
        experiment, rev, state = (found[key] or "" for key in ("Experiment", "rev", "State"))
        if not re.fullmatch(rf"{name}-\d+(-\d+)?", experiment):
            continue
        # Until it has ended, an experiment is shown with the results of the last commit.
        if state not in ("", "Success") or found.get("gain") is None:
            raise InputError(
                f"{experiment}: {state or 'has no results'}, so the table would lack it: run it "
                "again, or remove it (dvc queue remove --failed, dvc exp remove)"
            )
        settings = flatten(dvc.api.params_show(rev=rev))
        for key in committed.keys() - changed:
            if settings.get(key) != committed[key]:
                raise InputError(
                    f"{experiment}: has {key} = {settings.get(key)}, the last commit has "
                    f"{committed[key]}, and this sweep does not change it: dvc exp remove "
                    f"{experiment}"
                )
        # What null stands for, which is all images.
        settings["train.shared.images"] = read_json(training_path(MODES[0]), rev)["training_images"]
        seconds = sum(cost.get("seconds", 0) for cost in read_json(COST, rev).values())
        settings["minutes"] = round(seconds / 60, 1)
        if settings[columns[0]] is None:
            raise InputError(f"{experiment}: {columns[0]} = null has no place in a table; give it")
        row = {key: settings[key] for key in dict.fromkeys((*columns, "seed"))}
        row["model.weights"] = settings["model.weights"] or "random"
        metrics = dvc.api.metrics_show(rev=rev)
        rows.append(row | {f"{mode}.accuracy": metrics[f"{mode}.accuracy"] for mode in MODES})
    if not rows:
        raise InputError(f"there is no experiment {name}-... with results")
    return sorted(rows, key=lambda row: (row["model.weights"], row[columns[0]], row["seed"]))


def by_line(rows: list[dict[str, Any]], setting: str) -> Lines:
    """The accuracies at each value of the setting: of both modes, and of training from scratch,
    which is mode finetuned with random weights.
    """
    lines: Lines = {}
    for row in rows:
        scratch = row["model.weights"] == "random"
        names = {"finetuned": "from scratch"} if scratch else {mode: mode for mode in MODES}
        for mode, name in names.items():
            values = lines.setdefault(name, {})
            values.setdefault(row[setting], []).append(row[f"{mode}.accuracy"])
    return {name: lines[name] for name in STYLES if name in lines}


def draw(
    lines: Lines,
    title: str,
    x_label: str,
    logarithmic: bool = False,
    marked: float | None = None,
    decimals: int = 0,
) -> figures.Figure:
    """Mean accuracies, and the range of the runs where there are several, against a setting.

    A dashed line marks the value `marked`; numbers, in %, have `decimals`.
    """
    figure, axes = figures.plt.subplots(figsize=(8.5, 5), layout="constrained")
    means = {
        name: {x: np.mean(runs) for x, runs in points.items()} for name, points in lines.items()
    }
    for name, points in lines.items():
        colour, marker = STYLES[name]
        axes.plot(list(points), list(means[name].values()), color=colour, marker=marker, label=name)
        lowest, highest = ([end(runs) for runs in points.values()] for end in (min, max))
        axes.fill_between(list(points), lowest, highest, color=colour, alpha=0.2, linewidth=0)
    if logarithmic:
        axes.set_xscale("log")
    if marked is not None:
        axes.axvline(marked, color="0.5", linestyle="--", linewidth=1, zorder=0)
    figures.label_accuracy(axes, title, x_label)
    every = sorted({x for points in lines.values() for x in points})
    axes.set_xticks(every, [f"{x:,}" for x in every])
    axes.minorticks_off()

    # The highest mean has its number above it. Others have it below, but not on a lower line.
    space = 0.07 * np.ptp(axes.get_ylim())
    for x in every:
        here = sorted((points[x], name) for name, points in means.items() if x in points)
        for i, (accuracy, name) in enumerate(here):
            above = i == len(here) - 1
            if above or i == 0 or accuracy - here[i - 1][0] > space:
                text = f"{100 * accuracy:.{decimals}f}"
                axes.annotate(
                    text, (x, accuracy), (0, 7 if above else -7), size=9,
                    textcoords="offset points", ha="center", va="bottom" if above else "top",
                    color=STYLES[name][0],
                )  # fmt: skip
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sweep", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("name", choices=SWEEPS, help="which settings differ")
    parser.add_argument("--table", action="store_true", help="of experiments that have run")
    options = parser.parse_args()
    if not options.table:
        run(options.name)

    x = SWEEPS[options.name]["columns"][0]
    rows = experiments(options.name)
    lines = by_line(rows, x)
    if drawn := SWEEPS[options.name].get("figure"):
        figures.save(draw(lines, **drawn), DOCS / f"{options.name}.png")
    write_csv(DOCS / f"{options.name}.csv", rows)
    table = [
        (line, x, len(values), mean(values), min(values), max(values))
        for line, points in lines.items()
        for x, values in points.items()
    ]
    header = ("", x, "runs", "mean", "lowest", "highest")
    formats = ("", "g", "", ".2%", ".2%", ".2%")
    print(tabulate(table, header, intfmt=",", floatfmt=formats))


if __name__ == "__main__":
    exit_cleanly(main)
