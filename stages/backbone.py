"""Stage `backbone`: the pretrained, cut feature extractor, and a description of the network."""

from pathlib import Path

import torch

from transfer.architecture import describe
from transfer.common.arrays import PREPARED, load_classes
from transfer.common.files import write_text
from transfer.common.params import load_params
from transfer.common.stage import run_stage
from transfer.model.backbone import classifier, cut
from transfer.model.network import fill, save_weights
from transfer.pretrained import pretrained


def main() -> None:
    params = load_params()
    settings = params.model
    classes = load_classes(PREPARED)
    torch.manual_seed(params.seed)
    text = describe(settings, len(classes))
    print(text.partition("EVERY PARAMETER")[0], flush=True)
    backbone = cut(classifier(settings.name), settings.blocks)
    if settings.weights:
        state = pretrained(settings.name, settings.weights)
        fill(backbone, state, f"model.weights = {settings.weights}")
    save_weights(Path("models/backbone.safetensors"), backbone)
    write_text(Path("metrics/architecture.txt"), text)


if __name__ == "__main__":
    run_stage("backbone", main)
