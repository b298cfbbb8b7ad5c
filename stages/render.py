"""Stage `render`: the figures in figures/."""

import numpy as np

from transfer import figures
from transfer.data import load_json, load_split
from transfer.run import FIGURES, METRICS, read_csv, run_stage
from transfer.settings import MODES, load_params


def main() -> None:
    count = load_params().figures.first_batch_size
    classes, images = load_json("classes"), load_split("test").images
    table = read_csv(METRICS / "predictions.csv")
    true = np.array([row["label"] for row in table], object)
    predicted = {mode: np.array([row[mode] for row in table], object) for mode in MODES}
    confidence = {
        mode: np.array([float(row[f"{mode}_confidence"]) for row in table]) for mode in MODES
    }

    # Images that only one model classifies correctly, and mistakes; the most confident first.
    right = {mode: predicted[mode] == true for mode in MODES}

    def surest(mode: str, which: np.ndarray, count: int) -> np.ndarray:
        index = np.flatnonzero(which)
        return index[np.argsort(-confidence[mode][index], kind="stable")[:count]]

    changed, mistakes = {}, {}
    for mode, other in (("finetuned", "frozen"), ("frozen", "finetuned")):
        only = right[mode] & ~right[other]
        heading = f"Only {mode} is correct: {only.sum():,} of {len(true):,} test images"
        changed[f"{heading}, the most confident first"] = surest(mode, only, 24)
        heading = f"Mistakes of {mode}: {(~right[mode]).sum():,}, the most confident first"
        mistakes[heading] = surest(mode, ~right[mode], 16)
    sections = {
        "first_batch": {"The first test batch": np.arange(len(true))[:count]},
        "first_rows": {"The first test images": np.arange(len(true))[: min(count, 16)]},
        "changed": changed,
        "mistakes": mistakes,
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
