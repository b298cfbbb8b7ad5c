"""Stage `render`: the figures in figures/."""

import json
import math
from operator import eq

import numpy as np

from transfer import figures
from transfer.common.dataset import load_classes, load_split
from transfer.common.errors import InputError
from transfer.common.files import read_csv, replacing
from transfer.common.paths import EVALUATION, FIGURES, MOVEMENT, PREDICTIONS, PREPARED, curves_path
from transfer.common.run import run_stage
from transfer.common.settings import MODES, load_params

CHANGED = 24  # images of each kind in figures/changed.png
CURVES = [f"{part}_{what}" for part in ("train", "validation") for what in ("accuracy", "loss")]


def main() -> None:
    count = load_params().figures.first_batch_size
    classes = load_classes(PREPARED)
    test = load_split(PREPARED, "test", classes)
    predictions = read_predictions(classes)
    if predictions["label"] != test.labels.tolist():
        raise InputError(f"{PREDICTIONS}: its labels are not those of the test set")
    matrices = {mode: np.zeros((len(classes), len(classes)), int) for mode in MODES}
    for mode, counts in matrices.items():
        np.add.at(counts, (predictions["label"], predictions[mode]), 1)

    first = {name: values[:count] for name, values in predictions.items()}
    sections = {
        "first_batch": {"The first test batch": np.arange(len(first["label"]))},
        "first_rows": {"The first test images": np.arange(len(first["label"]))[:16]},
        "changed": changed(predictions),
    }
    names = np.array(classes, object)
    best = {
        mode: list(zip(names[predictions[mode]], predictions[f"{mode}_confidence"], strict=True))
        for mode in MODES
    }
    true = list(names[predictions["label"]])
    drawn = {
        name: figures.image_grid(test.images.numpy(), true, best, shown, names_are_true=True)
        for name, shown in sections.items()
    } | {
        "learning_curves": figures.learning_curves({mode: read_curves(mode) for mode in MODES}),
        "confusion": figures.confusion(matrices, classes),
        "per_class": figures.per_class(matrices, classes),
        "movement": figures.movement(read_movement()),
    }
    with replacing(FIGURES) as folder:
        folder.mkdir()
        for name, figure in drawn.items():
            figures.save(figure, folder / f"{name}.png")
    print_answer(first)


def changed(predictions: dict[str, list]) -> dict[str, np.ndarray]:
    """The images on which one mode alone is right: the indices of the surest, under a heading."""
    right = {mode: np.equal(predictions[mode], predictions["label"]) for mode in MODES}
    found = {}
    for mode, other in (("finetuned", "frozen"), ("frozen", "finetuned")):
        index = np.flatnonzero(right[mode] & ~right[other])
        surest = np.argsort(-np.array(predictions[f"{mode}_confidence"])[index], kind="stable")
        heading = f"Only {mode} is right: {len(index):,} of {len(right[mode]):,} test images"
        found[f"{heading}, its surest first"] = index[surest[:CHANGED]]
    return found


def print_answer(first: dict[str, list]) -> None:
    """Say what the metrics answer, and how many of the `first` test images each mode has right."""
    try:
        answer = {key: 100 * value for key, value in json.loads(EVALUATION.read_bytes()).items()}
        found = [f"{mode} {answer[f'{mode}.accuracy']:.2f} %" for mode in MODES]
        gain, low, high = (answer[key] for key in ("gain", "gain_low", "gain_high"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{EVALUATION}: cannot be read: {error!r}; run dvc repro") from None
    right = {mode: sum(map(eq, first[mode], first["label"])) for mode in MODES}
    counts = ", ".join(f"{mode} has {count} right" for mode, count in right.items())
    print(
        f"Accuracy on the test set: {', '.join(found)}: fine-tuning adds {gain:.2f} points (95 % "
        f"interval {low:.2f} to {high:.2f})\nOf the first {len(first['label'])} test images, "
        f"{counts}: {FIGURES / 'first_batch.png'}",
        flush=True,
    )


def number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def read_predictions(classes: list[str]) -> dict[str, list]:
    """Labels and predictions as class numbers, and confidences, of each test image."""
    numbers = {name: i for i, name in enumerate(classes)}
    columns = dict.fromkeys(("label", *MODES), numbers.__getitem__)
    confidences = dict.fromkeys((f"{mode}_confidence" for mode in MODES), number)
    return read_csv(PREDICTIONS, columns | confidences)


def read_movement() -> dict[str, list]:
    """How far each block moved: its name, and both kinds of parameters, nan where it has none."""
    kinds = ("weights", "scale_and_shift")
    columns = dict.fromkeys(kinds, lambda text: number(text) if text else math.nan)
    return read_csv(MOVEMENT, {"block": str} | columns)


def read_curves(mode: str) -> dict[str, list[float]]:
    """The values of each epoch, by name."""
    return read_csv(curves_path(mode), dict.fromkeys(CURVES, number))


if __name__ == "__main__":
    run_stage("render", main)
