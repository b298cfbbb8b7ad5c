"""Print and draw both models' predictions of images; needs the models that dvc repro trained."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from transfer import figures
from transfer.common.dataset import load_classes, load_split
from transfer.common.errors import exit_cleanly, printable
from transfer.common.paths import PREPARED, model_path
from transfer.common.settings import MODES, load_params
from transfer.inference import predict, set_up_torch
from transfer.model import load_network
from transfer.sources.images import read_image

DRAWN = Path("predictions.png")
MOST = 100  # images at a time: a taller figure is of no use
RANKS = ("first", "second", "third")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.predict", description=__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="an image file")
    paths = parser.parse_args().images
    if len(paths) > MOST:
        parser.error(f"{len(paths)} images; at most {MOST} at a time")

    params = load_params()
    device = set_up_torch(params.train.device, params.train.threads)
    classes = load_classes(PREPARED)
    # As large as the images that the models were trained on, so that they get no finer detail.
    size = load_split(PREPARED, "train", classes).images.shape[1]
    images = np.stack([read_image(path, size) for path in paths])
    networks = {
        mode: load_network(params.model, len(classes), model_path(mode), device) for mode in MODES
    }

    top = {}
    for mode, network in networks.items():
        logits = predict(network, torch.from_numpy(images), params.model.image_size)
        highest = logits.double().softmax(1).topk(min(len(RANKS), len(classes)))
        top[mode] = [
            [(classes[number], probability) for number, probability in zip(*row, strict=True)]
            for row in zip(highest.indices.tolist(), highest.values.tolist(), strict=True)
        ]
    names = [printable(path.name) for path in paths]
    room = max(12, shutil.get_terminal_size().columns - 68)  # beside the other columns
    rows = [
        (
            figures.shortened(name, room),
            mode,
            *(f"{share:6.1%} {figures.shortened(label, 10)}" for label, share in top[mode][i]),
        )
        for i, name in enumerate(names)
        for mode in MODES
    ]
    header = ("image", "mode", *RANKS)[: len(rows[0])]
    print(tabulate(rows, header, "plain", disable_numparse=True, preserve_whitespace=True))
    best = {mode: [ranked[0] for ranked in top[mode]] for mode in MODES}
    sections = {"Predictions of both models": np.arange(len(names))}
    figures.save(figures.image_grid(images, names, best, sections), DRAWN)
    print(f"drawn in {DRAWN}")


if __name__ == "__main__":
    exit_cleanly(main)
