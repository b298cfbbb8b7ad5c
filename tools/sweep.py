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
from tabulate import tabulate

from transfer import figures
from transfer.common.errors import InputError, exit_cleanly
from transfer.common.files import write_csv
from transfer.common.params import MODES
from transfer.common.stage import COST

FOLDER = Path("docs")


# The settings that the table has beside the seed, the first of which differs, and how the figure,
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


def value(settings: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        settings = settings[name]
    return settings


def training_images(settings: dict[str, Any]) -> int:
    """What train.shared.images: null stands for: CIFAR-10's 50,000 but those held out."""
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


def by_line(rows: list[dict[str, Any]], setting: str) -> figures.Lines:
    """The accuracies at each value of the setting: of both modes, and of training from scratch,
    which is mode finetuned with random weights.
    """
    lines: figures.Lines = {}
    for row in rows:
        scratch = row["model.weights"] == "random"
        names = {"finetuned": "from scratch"} if scratch else {mode: mode for mode in MODES}
        for mode, name in names.items():
            values = lines.setdefault(name, {})
            values.setdefault(row[setting], []).append(row[f"{mode}.accuracy"])
    return {name: lines[name] for name in figures.LINES if name in lines}


def main(name: str = "") -> None:
    if name not in SWEEPS:
        raise InputError(f"no sweep is named {name!r}; give one of {', '.join(SWEEPS)}")
    keys, drawn = SWEEPS[name]
    rows = experiments(name, keys)
    lines = by_line(rows, keys[0])
    if drawn:
        figures.save(figures.accuracy_by(lines, **drawn), FOLDER / f"{name}.png")
    write_csv(FOLDER / f"{name}.csv", rows)
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
