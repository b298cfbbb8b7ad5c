"""Stage `render`: the figures in figures/."""

import numpy as np

from transfer import figures
from transfer.data import load_classes, load_split
from transfer.run import FIGURES, METRICS, read_csv, run_stage
from transfer.settings import MODES, load_params

CHANGED = 24  # images of each kind in figures/changed.png


def main() -> None:
    count = load_params().figures.first_batch_size
    classes, images = load_classes(), load_split("test").images
    table = read_csv(METRICS / "predictions.csv")
    true = np.array([row["label"] for row in table], object)
    predicted = {mode: np.array([row[mode] for row in table], object) for mode in MODES}
    confidence = {
        mode: np.array([float(row[f"{mode}_confidence"]) for row in table]) for mode in MODES
    }

    # Images that only one model classifies correctly, the most confident first.
    changed = {}
    for mode, other in (("finetuned", "frozen"), ("frozen", "finetuned")):
        index = np.flatnonzero((predicted[mode] == true) & (predicted[other] != true))
        order = np.argsort(-confidence[mode][index], kind="stable")
        heading = f"Only {mode} is correct: {len(index):,} of {len(true):,} test images"
        changed[f"{heading}, the most confident first"] = index[order[:CHANGED]]
    sections = {
        "first_batch": {"The first test batch": np.arange(len(true))[:count]},
        "first_rows": {"The first test images": np.arange(len(true))[: min(count, 16)]},
        "changed": changed,
    }
    best = {mode: list(zip(predicted[mode], confidence[mode], strict=True)) for mode in MODES}

    number = {name: i for i, name in enumerate(classes)}
    matrices = {mode: np.zeros((len(classes), len(classes)), int) for mode in MODES}
    for mode, counts in matrices.items():
        for row in table:
            counts[number[row["label"]], number[row[mode]]] += 1

    curves = {mode: read_csv(METRICS / "curves" / f"{mode}.csv") for mode in MODES}
    drawn = {
        name: figures.image_grid(images.numpy(), list(true), best, shown, names_are_true=True)
        for name, shown in sections.items()
    } | {
        "learning_curves": figures.learning_curves(curves),
        "confusion": figures.confusion(matrices, classes),
        "per_class": figures.per_class(matrices, classes),
        "movement": figures.movement(read_csv(METRICS / "movement.csv")),
    }
    for name, figure in drawn.items():
        figures.save(figure, FIGURES / f"{name}.png")


if __name__ == "__main__":
    run_stage("render", main)
