"""Experiments that differ in one setting: run them, then make a table and a figure of them.

`python -m tools.sweep NAME`, a name in tools/sweeps.yaml, queues and runs experiments named
NAME-..., prints the mean and the range of their accuracies, and writes docs/NAME.csv, a line for
each experiment, and docs/NAME.png. With --table it takes those that have run.
"""

import argparse
import json
import re
import sys
from itertools import groupby, product
from pathlib import Path
from statistics import mean
from typing import Any

import dvc.api
import numpy as np
import yaml
from dvc.utils.flatten import flatten
from matplotlib.patheffects import withStroke
from tabulate import tabulate

from tools.compare import unfinished
from tools.isolated import git
from tools.setup import wait_for
from transfer import figures
from transfer.common.errors import InputError, exit_cleanly
from transfer.common.files import write_csv
from transfer.common.paths import COST, DETAILS, training_path
from transfer.common.run import refuse_lost_experiment
from transfer.common.settings import MODES

DOCS = Path("docs")
SWEEPS = yaml.safe_load(Path(__file__).with_name("sweeps.yaml").read_text(encoding="utf-8"))
# The lines of a figure: name, one of STYLES, in their order, and of which images -> x -> the
# accuracies of the runs there.
Lines = dict[tuple[str, str], dict[float, list[float]]]
STYLES = {mode: (figures.COLOURS[mode], figures.MARKERS[mode]) for mode in MODES}
STYLES["from scratch"] = ("#009E73", "^")


def run(name: str) -> None:
    """Queue and run the experiments of the sweep `name`, in temporary copies of the last commit.

    Raises InputError where they would be others than those: of other settings or code, or lost.
    """
    status = ("status", "--porcelain", "--untracked-files=no", "--")
    if changed := git(Path.cwd(), *status, "params.yaml", "dvc.yaml", "stages", "transfer"):
        raise InputError(
            "all experiments would differ from the last commit: commit what has changed, or undo "
            f"it with git restore: {changed}"
        )
    refuse_lost_experiment()
    sweep = SWEEPS[name]
    experiment = [sys.executable, "-m", "dvc", "exp", "run"]
    commands = [
        ["--queue", f"--name={name}-{number}", *(f"-S{key}={grid[key]}" for key in grid)]
        for number, grid in enumerate(sweep["grids"])
    ]
    for options in (*commands, ["--run-all", "--jobs", str(sweep.get("jobs", 1))]):
        if wait_for([*experiment, *options]):
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
        experiment, rev = found["Experiment"] or "", found["rev"]
        if not re.fullmatch(rf"{name}-\d+(-\d+)?", experiment):
            continue
        if reason := unfinished(found):
            raise InputError(
                f"{experiment}: {reason}, so the table would lack it: run it "
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
        cost = flatten(read_json(COST, rev))
        seconds = sum(value for key, value in cost.items() if key.endswith(".seconds"))
        settings |= cost | {"minutes": round(seconds / 60, 1)}
        settings["moved"] = read_json(DETAILS, rev)["finetuned.moved"]
        if settings[columns[0]] is None:
            raise InputError(f"{experiment}: {columns[0]} = null has no place in a table; give it")
        row = {key: settings[key] for key in dict.fromkeys((*columns, "seed"))}
        row["model.weights"] = settings["model.weights"] or "random"
        metrics = dvc.api.metrics_show(rev=rev)
        rows.append(row | {f"{mode}.accuracy": metrics[f"{mode}.accuracy"] for mode in MODES})
    if not rows:
        raise InputError(f"there is no experiment {name}-... with results")
    return sorted(rows, key=lambda row: (row["model.weights"], row[columns[0]], row["seed"]))


def by_line(rows: list[dict[str, Any]], columns: list[str], x: str, split: str | None) -> Lines:
    """The accuracies of both modes, and of training from scratch, which is mode finetuned with
    random weights; at each value of the first column, or where `x` has its mean there.

    With `split`, each value of that column has lines of its own.
    """

    def place(row: dict[str, Any]) -> tuple:
        return (row["model.weights"], row[split] if split else 0, row[columns[0]])

    lines: Lines = {}
    for (weights, part, first), group in groupby(sorted(rows, key=place), place):
        runs = list(group)
        where = first if x == columns[0] else mean(row[x] for row in runs)
        scratch = weights == "random"
        names = {"finetuned": "from scratch"} if scratch else {mode: mode for mode in MODES}
        for mode, name in names.items():
            accuracies = [row[f"{mode}.accuracy"] for row in runs]
            key = (name, f", {part:,} images" if split else "")
            lines.setdefault(key, {})[where] = accuracies
    order = list(STYLES)
    return dict(sorted(lines.items(), key=lambda line: order.index(line[0][0])))


def draw(
    axes: figures.Axes,
    lines: Lines,
    width: float,
    logarithmic: bool = False,
    marked: float | None = None,
    decimals: int = 0,
) -> None:
    """Mean accuracies, and the range of the runs where there are several, against a setting.

    What is the same everywhere is a horizontal line, a dashed line marks the value `marked`.
    Numbers, in %, have `decimals`. The axes are `width` inches wide.
    """
    every = sorted({x for points in lines.values() for x in points})
    if logarithmic:
        axes.set_xscale("log")
    if marked is not None:
        axes.axvline(marked, color="0.5", linestyle="--", linewidth=1, zorder=0)
    numbers: dict[tuple[str, str], dict[float, float]] = {}
    dashes = dict(zip(dict.fromkeys(part for _, part in lines), ("-", "--", ":"), strict=False))
    for (name, part), points in lines.items():
        (colour, marker), label, dash = STYLES[name], name + part, dashes[part]
        lowest, middle, highest = (
            [of(runs) for runs in points.values()] for of in (min, mean, max)
        )
        if len(middle) > 1 == len({*middle}):
            numbers[name, part] = {every[-1]: middle[0]}
            axes.axhline(middle[0], color=colour, linestyle=dash, label=label)
            axes.axhspan(lowest[0], highest[0], color=colour, alpha=0.2, linewidth=0)
        else:
            numbers[name, part] = dict(zip(points, middle, strict=True))
            axes.plot(list(points), middle, dash, color=colour, marker=marker, label=label)
            axes.fill_between(list(points), lowest, highest, color=colour, alpha=0.2, linewidth=0)
    if any(len(runs) > 1 for points in lines.values() for runs in points.values()):
        axes.fill_between([], [], color="0.5", alpha=0.2, linewidth=0, label="range of the runs")

    # As many values of x as have space, 0.6 inches each.
    places = (axes.transScale + axes.transLimits).transform([(x, 0) for x in every])[:, 0]
    ticks: list[tuple[float, float]] = []
    for x, place in zip(every, places, strict=True):
        if not ticks or place > ticks[-1][1] + 0.6 / width:
            ticks.append((x, place))
    shown = [x for x, _ in ticks]
    axes.set_xticks(
        shown,
        [f"{x:,}" if isinstance(x, int) else f"{x:.2g}" if x < 1 else f"{x:.3g}" for x in shown],
    )
    axes.minorticks_off()

    # The highest mean has its number above it. Others have it below, but not on a lower line.
    space, outline = 0.07 * np.ptp(axes.get_ylim()), withStroke(linewidth=3, foreground="white")
    for x, part in product(every, {part for _, part in numbers}):
        here = sorted(
            (points[x], STYLES[name][0])
            for (name, of), points in numbers.items()
            if x in points and of == part
        )
        for i, (accuracy, colour) in enumerate(here):
            above = i == len(here) - 1
            if above or i == 0 or accuracy - here[i - 1][0] > space:
                text = f"{100 * accuracy:.{decimals}f}"
                axes.annotate(
                    text, (x, accuracy), (0, 7 if above else -7), size=9, color=colour,
                    textcoords="offset points", ha="center", va="bottom" if above else "top",
                    path_effects=[outline],
                )  # fmt: skip


def figure_of(
    rows: list[dict[str, Any]],
    columns: list[str],
    title: str,
    x: dict[str, str],
    split: str | None = None,
    marked: float | None = None,
    **how: Any,
) -> figures.Figure:
    """A panel for each column that is an `x`, with its label; `marked` is a value of the first."""
    width = 8.5 if len(x) == 1 else 6.5
    figure, panels = figures.plt.subplots(
        1, len(x), figsize=(width * len(x), 5), layout="constrained", squeeze=False
    )
    for axes, column in zip(panels[0], x, strict=True):
        lines = by_line(rows, columns, column, split)
        figures.label_accuracy(axes, title if column == columns[0] else "", x[column])
        draw(axes, lines, width, marked=marked if column == columns[0] else None, **how)
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5)
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

    sweep = SWEEPS[options.name]
    columns, rows = sweep["columns"], experiments(options.name)
    drawn = sweep.get("figure", {})
    if drawn:
        figures.save(figure_of(rows, columns, **drawn), DOCS / f"{options.name}.png")
    write_csv(DOCS / f"{options.name}.csv", rows)
    table = [
        ("".join(line), x, len(values), mean(values), min(values), max(values))
        for line, points in by_line(rows, columns, columns[0], drawn.get("split")).items()
        for x, values in points.items()
    ]
    header = ("", columns[0], "runs", "mean", "lowest", "highest")
    formats = ("", "g", "", ".2%", ".2%", ".2%")
    print(tabulate(table, header, intfmt=",", floatfmt=formats))


if __name__ == "__main__":
    exit_cleanly(main)
