"""Run the experiments of a sweep of tools/sweeps.yaml; write docs/NAME.csv and docs/NAME.png.

The table has a row for each experiment: each setting in which any of them differs from the last
commit, how far the weights of the backbone moved, and, of each mode, the minutes of its training,
its results on the validation images, by which settings are chosen, and its accuracy on the test
set.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import dvc.api
import yaml
from tabulate import tabulate

from transfer import figures
from transfer.run import COST, read_csv, run_tool, write_csv
from transfer.settings import MODES, InputError, Params

SWEEPS = yaml.safe_load(Path(__file__).with_name("sweeps.yaml").read_text(encoding="utf-8"))
VALIDATION = ("validation_loss", "validation_accuracy")
STYLES = {mode: (figures.COLOURS[mode], figures.MARKERS[mode]) for mode in MODES}
STYLES |= {"from scratch": ("#009E73", "^"), "gain": ("0.2", "D")}


def run(name: str) -> None:
    """Queue and run the experiments of the sweep `name`, in copies of the last commit."""
    sweep = SWEEPS[name]
    commands = [
        ["--queue", f"--name={name}-{number}", *(f"-S{key}={grid[key]}" for key in grid)]
        for number, grid in enumerate(sweep["grids"])
    ]
    for options in (*commands, ["--run-all", "--jobs", str(sweep.get("jobs", 1))]):
        if subprocess.run([sys.executable, "-m", "dvc", "exp", "run", *options]).returncode:
            raise InputError(
                "dvc exp run failed; its message stands above. Uncommitted changes and earlier "
                f"experiments named {name}-... must go first (git stash, dvc exp remove)"
            )


def experiments(name: str) -> list[dict[str, Any]]:
    """A row for each experiment of the sweep. Raises InputError if one has not ended well."""
    _, committed, *others = dvc.api.exp_show()
    found = [row for row in others if (row["Experiment"] or "").startswith(f"{name}-")]
    # Until it has ended, DVC lists an experiment with the results of the last commit.
    if bad := [row for row in found if row["State"] not in (None, "", "Success")]:
        raise InputError(f"{bad[0]['Experiment']}: {bad[0]['State']}; run or remove it first")
    settings = [key for key in committed if key.partition(".")[0] in Params.model_fields]
    differing = [key for key in settings if any(row[key] != committed[key] for row in found)]
    found.sort(key=lambda row: [(str(type(row[key])), row[key]) for key in differing])
    rows = []
    for one in found:
        # DVC makes all numbers floats.
        values = {key: one[key] for key in differing}
        row = {k: f"{v:g}" if isinstance(v, float) else v for k, v in values.items()}
        read = partial(dvc.api.read, rev=one["rev"], encoding="utf-8")
        row["moved"] = json.loads(read("metrics/details.json"))["finetuned.moved"]
        for mode in MODES:
            seconds = json.loads(read(COST.as_posix()))[f"train@{mode}"]["seconds"]
            *_, last = csv.DictReader(read(f"metrics/curves/{mode}.csv").splitlines())
            row[f"{mode}.minutes"] = round(seconds / 60, 1)
            row |= {f"{mode}.{key}": last[key] for key in VALIDATION}
            row[f"{mode}.accuracy"] = one[f"{mode}.accuracy"]
        rows.append(row)
    return rows


def draw(rows: list[dict[str, str]], sweep: dict[str, Any]) -> figures.Figure:
    """Accuracies of both modes and from scratch, or how far the backbone `moved`, and what
    fine-tuning adds, against the sweep's `x`: each run, and a line through the means.
    """
    lines: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        x, part = float(row[sweep["x"]]), row[sweep["split"]] if "split" in sweep else ""
        frozen, finetuned = (100 * float(row[f"{mode}.accuracy"]) for mode in MODES)
        values = {"frozen": frozen, "finetuned": finetuned, "gain": finetuned - frozen}
        if row.get("model.weights") == "None":
            values = {"from scratch": finetuned}
        elif "moved" in sweep:
            values = {"finetuned": 100 * float(row["moved"]), "gain": finetuned - frozen}
        for name, value in values.items():
            lines[name, part][x].append(value)
    figure, (left, right) = figures.plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    dashes = dict(zip(sorted({part for _, part in lines}), ("-", "--", ":"), strict=False))
    for (name, part), points in lines.items():
        (colour, marker), axes = STYLES[name], right if name == "gain" else left
        places = sorted(points)
        middle = [mean(points[place]) for place in places]
        label = f"{name}, {part.replace('None', 'all')} images" if part else name
        axes.plot(places, middle, dashes[part], color=colour, marker=marker, label=label)
        single = [(x, y) for x in places for y in points[x]]
        axes.plot(*zip(*single, strict=True), "_", color=colour)
        # Labels are below the lower lines: the fine-tuned models are nearly always the best.
        offset = {"frozen": -14, "from scratch": -20}.get(name, 6)
        if part and dashes[part] == "-":
            offset = -14
        for place, value in zip(places, middle, strict=True):
            axes.annotate(
                f"{value:+.1f}" if name == "gain" else f"{value:.1f}", (place, value), (0, offset),
                size=8, color=colour, textcoords="offset points", ha="center",
            )  # fmt: skip
    everywhere = sorted({place for points in lines.values() for place in points})
    for axes in (left, right):
        if everywhere[-1] > 20 * everywhere[0]:
            axes.set_xscale("log")
        axes.set_xticks(everywhere, [f"{place:g}" for place in everywhere], rotation=45)
        axes.minorticks_off()
        axes.set_xlabel(sweep["x"])
        axes.margins(y=0.15)
        axes.grid(alpha=0.25)
    right.axhline(0, color="0.3", linewidth=1)
    left.set_title(sweep.get("moved", "Accuracy on the test set, %"))
    right.set_title("Gain of fine-tuning, percentage points")
    figure.suptitle(sweep["message"], x=0.01, ha="left", weight="bold")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def answer(seeds: list[dict[str, str]], longer: list[dict[str, str]]) -> figures.Figure:
    """Every seed's accuracy: frozen, frozen for as long as both phases take, and fine-tuned."""
    groups = {
        "frozen": (seeds, "frozen"),
        "frozen, trained for\nas long as both phases": (longer, "frozen"),
        "fine-tuned": (seeds, "finetuned"),
    }
    figure, axes = figures.plt.subplots(figsize=(8.5, 3), layout="constrained")
    for y, (rows, mode) in enumerate(groups.values()):
        values, colour = [float(row[f"{mode}.accuracy"]) for row in rows], figures.COLOURS[mode]
        axes.plot(values, [y] * len(values), "|", color=colour, markersize=18, markeredgewidth=2)
        axes.plot(mean(values), y, figures.MARKERS[mode], color=colour, markersize=9)
        axes.annotate(f"{100 * mean(values):.1f} %", (max(values), y), (10, 0), color=colour,
                      textcoords="offset points", va="center", weight="bold")  # fmt: skip
    # What each seed gains over its frozen model.
    frozen = {row["seed"]: float(row["frozen.accuracy"]) for row in seeds}
    gain = [float(row["finetuned.accuracy"]) - frozen[row["seed"]] for row in seeds]
    more = [float(row["frozen.accuracy"]) - frozen[row["seed"]] for row in longer]
    axes.set(
        title=f"Fine-tuning adds {100 * mean(gain):.1f} percentage points; training the head for\n"
        f"as long adds {100 * mean(more):.1f}",
        xlabel="accuracy on the test set: each seed, and the mean",
        ylim=(2.5, -0.5),
    )
    axes.set_yticks(range(3), [f"{name} ({len(rows)} seeds)" for name, (rows, _) in groups.items()])
    axes.xaxis.set_major_formatter(figures.PERCENT)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.25)
    return figure


def main() -> None:
    names = "\n".join(f"  {name:10} {sweep['about']}" for name, sweep in SWEEPS.items())
    parser = argparse.ArgumentParser(
        "python -m tools.sweep", description=f"{__doc__}\nThe sweeps:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("name", choices=SWEEPS)
    parser.add_argument("--table", action="store_true", help="of experiments that have run")
    parser.add_argument("--figure", action="store_true", help="of the table that is there")
    options = parser.parse_args()
    path, sweep = Path("docs", f"{options.name}.csv"), SWEEPS[options.name]
    if not options.figure:
        if not options.table:
            run(options.name)
        rows = experiments(options.name)
        if not rows:
            raise InputError(f"there is no experiment named {options.name}-...")
        write_csv(path, rows)
        print(tabulate(rows, "keys"))
    if "x" in sweep:
        figures.save(draw(read_csv(path), sweep), path.with_suffix(".png"))
    both = [Path("docs", f"{name}.csv") for name in ("seeds", "longer")]
    if path in both and all(table.exists() for table in both):
        figures.save(answer(*map(read_csv, both)), Path("docs/answer.png"))


if __name__ == "__main__":
    run_tool(main)
