"""Stage `render`: the pictures in figures/."""

import math
from pathlib import Path

import numpy as np

from transfer import data, figures, params
from transfer.command import run_stage
from transfer.errors import InputError
from transfer.files import read_csv

ARRAYS = Path("data/cifar10")
METRICS = Path("metrics")
FIGURES = Path("figures")
PARTS = ("train", "validation")  # of the training images, as the curves name them


def number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def main() -> None:
    count = params.load().evaluate.batch_size
    classes = data.load_classes(ARRAYS)
    pictures = data.load_split(ARRAYS, "test", classes)
    path = METRICS / "predictions.csv"
    columns = dict.fromkeys(("actual", *params.MODES), classes.index)
    columns |= {f"{mode}_confidence": number for mode in params.MODES}
    predictions = read_csv(path, columns)
    if predictions["actual"] != pictures.labels.tolist():
        raise InputError(f"{path}: its true classes are not those of the test set; run dvc repro")
    curves, matrices, accuracy = {}, {}, {}
    for mode in params.MODES:
        folder = METRICS / "curves" / mode / "plots" / "metrics"
        curves[mode] = {
            name: read_csv(folder / f"{name}.tsv", {name: number}, "\t")[name]
            for name in (f"{part}_{what}" for part in PARTS for what in ("accuracy", "loss"))
        }
        if len({len(values) for values in curves[mode].values()}) > 1:
            lengths = ", ".join(f"{name} {len(values)}" for name, values in curves[mode].items())
            raise InputError(f"{folder}: not equally many epochs: {lengths}; run dvc repro")
        matrices[mode] = np.zeros((len(classes), len(classes)), int)
        np.add.at(matrices[mode], (predictions["actual"], predictions[mode]), 1)
        accuracy[mode] = matrices[mode].diagonal() / matrices[mode].sum(1)
    first = {name: values[:count] for name, values in predictions.items()}
    drawn = {
        "first_batch": figures.first_batch(pictures.images[:count].numpy(), first, classes),
        "learning_curves": figures.learning_curves(curves),
        "confusion": figures.confusion(matrices, classes),
        "per_class": figures.per_class(accuracy, classes),
    }
    for name, figure in drawn.items():
        figures.save(figure, FIGURES / f"{name}.png")


if __name__ == "__main__":
    run_stage("render", main)
