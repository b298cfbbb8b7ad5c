"""Stage `backbone`: the pretrained, cut feature extractor, and a description of the network."""

import torch
from torch import nn

from transfer.architecture import describe
from transfer.common.dataset import load_classes
from transfer.common.files import write_text
from transfer.common.paths import ARCHITECTURE, BACKBONE, PREPARED
from transfer.common.run import run_stage
from transfer.common.settings import load_params
from transfer.model import (
    Network,
    check_blocks,
    classifier,
    cut,
    fill,
    normalisation,
    save_weights,
)
from transfer.pretrained import pretrained


def main() -> None:
    params = load_params()
    settings = params.model
    classes = load_classes(PREPARED)
    check_blocks(settings)
    torch.manual_seed(params.seed)
    text = describe(settings, len(classes))
    print(text.partition("EVERY PARAMETER")[0], flush=True)
    backbone = cut(classifier(settings.name), settings.blocks)
    if settings.weights:
        state = pretrained(settings.name, settings.weights)
        fill(backbone, state, f"model.weights = {settings.weights}")
    no_head = nn.Sequential()
    network = Network(backbone, no_head, normalisation(settings.name, settings.weights))
    save_weights(BACKBONE, network)
    write_text(ARCHITECTURE, text)


if __name__ == "__main__":
    run_stage("backbone", main)
