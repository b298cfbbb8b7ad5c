"""Print and draw what both models take pictures for; needs the models that dvc repro trained."""

import argparse
from pathlib import Path

import numpy as np
import torch

from transfer import data, figures, model, params, training
from transfer.description import table
from transfer.errors import exit_cleanly

ARRAYS = Path("data/cifar10")
DRAWN = Path("predictions.png")
MOST = 100  # pictures at a time: a taller drawing is of no use
RANKS = ("first", "second", "third")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.predict", description=__doc__)
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE", help="a picture file")
    paths = parser.parse_args().pictures
    if len(paths) > MOST:
        parser.error(f"{len(paths)} pictures; at most {MOST} at a time")

    settings = params.load()
    device = training.set_up(settings.train.device, settings.train.threads)
    classes = data.load_classes(ARRAYS)
    # As large as the pictures that the models learned from, so that they see no finer detail.
    size = data.load_split(ARRAYS, "test", classes).images.shape[1]
    images = np.stack([data.read_picture(path, size) for path in paths])
    networks = {
        mode: model.trained(
            settings.model, len(classes), Path(f"models/{mode}.safetensors"), device
        )
        for mode in params.MODES
    }

    top = {}
    for mode, network in networks.items():
        logits = training.predict(network, torch.from_numpy(images), settings.model.image_size)
        best = logits.double().softmax(1).topk(min(len(RANKS), len(classes)))
        top[mode] = [
            [(classes[number], probability) for number, probability in zip(*row, strict=True)]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    names = [str(path) for path in paths]
    rows = [
        (
            figures.shortened(name, 40),
            mode,
            *(f"{probability:6.1%} {label}" for label, probability in top[mode][i]),
        )
        for i, name in enumerate(names)
        for mode in params.MODES
    ]
    print(table(("picture", "mode", *RANKS)[: len(rows[0])], rows))
    figures.save(figures.answers(images, names, top), DRAWN)
    print(f"drawn in {DRAWN}")


if __name__ == "__main__":
    exit_cleanly(main)
