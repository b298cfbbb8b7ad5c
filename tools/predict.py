"""Predict images with both models that dvc repro trained: predictions.csv and predictions.png.

Files that cannot be read are named, the others are predicted, and the exit status is 1.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from transfer import figures
from transfer.images import CHUNK, hidden, read_images
from transfer.model import load, predict
from transfer.run import model_path, run_tool, set_up_torch
from transfer.settings import MODES, InputError, load_params

TABLE, DRAWN = Path("predictions.csv"), Path("predictions.png")
MAX_DRAWN = 64  # images in the figure


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.predict", description=__doc__)
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="PATH", help="an image file, or a folder of images"
    )
    given = parser.parse_args().images
    paths = list(dict.fromkeys(path for one in given for path in files_in(one)))  # each once
    settings = load_params().train
    device = set_up_torch(settings.device, settings.threads)
    networks = {mode: load(model_path(mode), device) for mode in MODES}
    # As large as the images that the models were trained on, so that they get no finer detail.
    size = networks["finetuned"].pixels

    shown: list[np.ndarray] = []
    first: list[dict[str, str]] = []
    bad = 0
    DRAWN.unlink(missing_ok=True)  # an earlier one would not fit the table
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        columns = ["path", *(f"{mode}{part}" for mode in MODES for part in ("", "_confidence"))]
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        for start in range(0, len(paths), CHUNK):
            chunk = paths[start : start + CHUNK]
            read = dict(zip(chunk, read_images(chunk, size), strict=True))
            for error in (image for image in read.values() if isinstance(image, InputError)):
                print(f"error: {error}", file=sys.stderr)
                bad += 1
            good = {path: image for path, image in read.items() if isinstance(image, np.ndarray)}
            if good:
                rows = predict_chunk(networks, good)
                table.writerows(rows)
                shown += [*good.values()][: MAX_DRAWN - len(first)]
                first += rows[: MAX_DRAWN - len(first)]
    if not first:
        raise InputError(f"none of {len(paths)} files can be read as an image")

    best = {m: [(row[m], float(row[f"{m}_confidence"])) for row in first] for m in MODES}
    for i, row in enumerate(first):
        answers = ", ".join(
            f"{mode} {best[mode][i][0]} ({figures.percent(best[mode][i][1])})" for mode in MODES
        )
        print(f"{row['path']}: {answers}")
    names = [Path(row["path"]).name for row in first]
    sections = {"Predictions of both models": np.arange(len(first))}
    figures.save(figures.image_grid(np.stack(shown), names, best, sections), DRAWN)
    print(f"{len(paths) - bad} images in {TABLE}; the first {len(first)} are drawn in {DRAWN}")
    sys.exit(bad > 0)


def files_in(given: Path) -> Iterator[Path]:
    """The files in a folder, sorted, without hidden and system files; a file itself."""
    if not given.exists():
        raise InputError(f"{given}: does not exist")
    if given.is_dir():
        inside = (path.relative_to(given) for path in sorted(given.rglob("*")) if path.is_file())
        yield from (given / path for path in inside if not hidden(path))
    else:
        yield given


def predict_chunk(networks: dict, images: dict[Path, np.ndarray]) -> list[dict[str, str]]:
    """A row of the table for each of the `images`: its path, each mode's class and confidence."""
    stacked = torch.from_numpy(np.stack([*images.values()]))
    rows = [{"path": path.as_posix()} for path in images]
    for mode, network in networks.items():
        confidence, label = predict(network, stacked).double().softmax(1).max(1)
        for row, share, number in zip(rows, confidence.tolist(), label.tolist(), strict=True):
            row |= {mode: network.classes[number], f"{mode}_confidence": f"{share:.4f}"}
    return rows


if __name__ == "__main__":
    run_tool(main)
