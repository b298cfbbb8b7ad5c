"""Print and draw both models' predictions of images; needs the models that dvc repro trained."""

import argparse
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from transfer import figures
from transfer.data import load_split
from transfer.images import read_image
from transfer.model import load, predict
from transfer.run import model_path, run_tool, set_up_torch
from transfer.settings import MODES, load_params

DRAWN = Path("predictions.png")
MAX_IMAGES = 100  # a taller figure is of no use


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.predict", description=__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="an image file")
    paths = parser.parse_args().images
    if len(paths) > MAX_IMAGES:
        parser.error(f"{len(paths)} images; at most {MAX_IMAGES} at a time")

    settings = load_params().train
    device = set_up_torch(settings.device, settings.threads)
    networks = {mode: load(model_path(mode), device) for mode in MODES}
    # As large as the images that the models were trained on, so that they get no finer detail.
    size = load_split("train").images.shape[1]
    images = np.stack([read_image(path, size) for path in paths])
    best = {}
    for mode, network in networks.items():
        probabilities = predict(network, torch.from_numpy(images)).double().softmax(1)
        found = zip(*(values.tolist() for values in probabilities.max(1)), strict=True)
        best[mode] = [(network.classes[label], confidence) for confidence, label in found]

    cells = ([f"{share:.1%}  {label}" for label, share in best[mode]] for mode in MODES)
    rows = zip((path.name for path in paths), *cells, strict=True)
    print(tabulate(rows, ("image", *MODES), disable_numparse=True))
    sections = {"Predictions of both models": np.arange(len(paths))}
    figures.save(figures.image_grid(images, [path.name for path in paths], best, sections), DRAWN)
    print(f"drawn in {DRAWN}")


if __name__ == "__main__":
    run_tool(main)
