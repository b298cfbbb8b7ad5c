"""Stage `render`: the pictures in figures/."""

import csv
from pathlib import Path

import numpy as np

from transfer import data, figures, params
from transfer.command import run_stage

ARRAYS = Path("data/cifar10")
METRICS = Path("metrics")
FIGURES = Path("figures")


def read(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def main() -> None:
    count = params.load().evaluate.batch_size
    classes = data.load_classes(ARRAYS)
    images = data.load_split(ARRAYS, "test").images[:count].numpy()
    predictions = read(METRICS / "predictions.csv")
    curves, matrices, accuracy = {}, {}, {}
    for mode in params.MODES:
        curves[mode] = {
            path.stem: np.array([float(row[path.stem]) for row in read(path, "\t")])
            for path in (METRICS / "curves" / mode / "plots" / "metrics").glob("*.tsv")
        }
        matrices[mode] = np.zeros((len(classes), len(classes)), int)
        for row in predictions:
            matrices[mode][classes.index(row["actual"]), classes.index(row[mode])] += 1
        accuracy[mode] = matrices[mode].diagonal() / matrices[mode].sum(1)
    drawn = {
        "first_batch": figures.first_batch(images, predictions[:count], list(params.MODES)),
        "learning_curves": figures.learning_curves(curves),
        "confusion": figures.confusion(matrices, classes),
        "per_class": figures.per_class(accuracy, classes),
    }
    for name, figure in drawn.items():
        figures.save(figure, FIGURES / f"{name}.png")


if __name__ == "__main__":
    run_stage("render", main)
