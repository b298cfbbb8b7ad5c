"""A table and a figure of experiments that differ in one setting, or in their minutes.

`python -m tools.sweep NAME`, NAME one of SWEEPS, takes the experiments named NAME-... of the last
commit that have run, prints the mean and the range of their accuracies, and writes docs/NAME.csv,
a line for each experiment, and docs/NAME.png. `make` runs the experiments and this.
"""

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import dvc.api
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tabulate import tabulate

from transfer import figures
from transfer.common.errors import InputError, exit_cleanly
from transfer.common.files import write_csv
from transfer.common.paths import COST
from transfer.common.settings import MODES

DOCS = Path("docs")

# The columns of the table besides the seed, the first of which is the x axis, and how the figure,
# if there is one, is drawn. "minutes" are those of the whole pipeline.
SWEEPS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "seeds": (["seed"], {}),
    "heads": (["model.head"], {}),
    "images": (
        ["train.shared.images"],
        {
            "title": "What transfer learning gives, and when",
            "x_label": "training images, equally many of each class (logarithmic)",
            "logarithmic": True,
        },
    ),
    "blocks": (
        ["model.blocks"],
        {
            "title": "Where to cut the pretrained network",
            "x_label": "blocks of the feature extractor that are kept (dashed: the default)",
            "marked": 5,
        },
    ),
    "recipes": (
        ["minutes", "model.image_size", "train.finetuned.epochs"],
        {
            "title": "What more time gives",
            "x_label": "minutes of the whole pipeline on two CPU cores (logarithmic)",
            "logarithmic": True,
            "decimals": 1,
        },
    ),
}
# The lines of a figure, in this order: name -> x -> the accuracies of the runs there.
Lines = dict[str, dict[float, list[float]]]
STYLES = {mode: (figures.COLOURS[mode], figures.MARKERS[mode]) for mode in MODES}
STYLES["from scratch"] = ("#009E73", "^")


def value(settings: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        settings = settings[name]
    return settings


def training_images(settings: dict[str, Any]) -> int:
    """What train.shared.images: null stands for: CIFAR-10's 50,000 without validation images."""
    return 50_000 - round(50_000 * settings["train"]["shared"]["validation_share"])


def minutes(rev: str) -> float:
    """How long the stages took whose results are in the commit `rev`, whenever they ran."""
    costs = json.loads(dvc.api.read(COST.as_posix(), rev=rev, encoding="utf-8"))
    return round(sum(cost.get("seconds", 0) for cost in costs.values()) / 60, 1)


def experiments(name: str, keys: list[str]) -> list[dict[str, Any]]:
    """A row for each experiment that has run: settings (`keys`), seed, weights, results."""
    rows = []
    for found in dvc.api.exp_show():
        named = (found["Experiment"] or "").startswith(f"{name}-")
        # Until it has ended, an experiment is shown with the results of the last commit.
        if not named or found["State"] not in (None, "Success") or found.get("gain") is None:
            continue
        settings = dvc.api.params_show(rev=found["rev"])
        shared = settings["train"]["shared"]
        shared["images"] = shared["images"] or training_images(settings)
        settings["minutes"] = minutes(found["rev"])
        metrics = dvc.api.metrics_show(rev=found["rev"])
        row = {key: value(settings, key) for key in dict.fromkeys((*keys, "seed"))}
        row["model.weights"] = settings["model"]["weights"] or "random"
        rows.append(row | {f"{mode}.accuracy": metrics[f"{mode}.accuracy"] for mode in MODES})
    if not rows:
        raise InputError(f"there is no experiment {name}-1 with results; see the Makefile")
    return sorted(rows, key=lambda row: (row["model.weights"], row[keys[0]], row["seed"]))


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
) -> Figure:
    """Mean accuracies, and the range of the runs where there are several, against a setting.

    A dashed line marks the value `marked`; numbers, in %, have `decimals`.
    """
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
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


def main(name: str = "") -> None:
    if name not in SWEEPS:
        raise InputError(f"no sweep is named {name!r}; give one of {', '.join(SWEEPS)}")
    keys, drawn = SWEEPS[name]
    rows = experiments(name, keys)
    lines = by_line(rows, keys[0])
    if drawn:
        figures.save(draw(lines, **drawn), DOCS / f"{name}.png")
    write_csv(DOCS / f"{name}.csv", rows)
    table = [
        (line, x, len(values), mean(values), min(values), max(values))
        for line, points in lines.items()
        for x, values in points.items()
    ]
    header = ("", keys[0], "runs", "mean", "lowest", "highest")
    formats = ("", "g", "", ".2%", ".2%", ".2%")
    print(tabulate(table, header, intfmt=",", floatfmt=formats))


if __name__ == "__main__":
    exit_cleanly(lambda: main(*sys.argv[1:]))
