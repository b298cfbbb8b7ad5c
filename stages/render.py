"""Stage `render`: the figures in figures/."""

import numpy as np
from sklearn.metrics import confusion_matrix

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
    first = {mode: f"{mode} {right[mode][:count].sum()}" for mode in MODES}
    heading = f"The first test batch, correct of {len(true[:count])}: {', '.join(first.values())}"
    sections = {
        "first_batch": {heading: np.arange(len(true))[:count]},
        "first_rows": {"The first test images": np.arange(len(true))[: min(count, 16)]},
        "changed": changed,
        "mistakes": mistakes,
    }
    best = {mode: list(zip(predicted[mode], confidence[mode], strict=True)) for mode in MODES}
    matrices = [confusion_matrix(true, predicted[mode], labels=classes) for mode in MODES]
    curves = {mode: read_csv(METRICS / "curves" / f"{mode}.csv") for mode in MODES}
    drawn = {
        name: figures.image_grid(images.numpy(), list(true), best, shown, names_are_true=True)
        for name, shown in sections.items()
    } | {
        "learning_curves": figures.learning_curves(curves),
        "confusion": figures.confusion(matrices, classes),
        "per_class": figures.per_class(read_csv(METRICS / "per_class.csv")),
        "movement": figures.movement(read_csv(METRICS / "movement.csv")),
    }
    for name, figure in drawn.items():
        figures.save(figure, FIGURES / f"{name}.png")


if __name__ == "__main__":
    run_stage("render", main)
