"""Stage `network`: the pretrained, cut backbone with a new head, and a description of them."""

import torch

from transfer.architecture import describe
from transfer.common.dataset import load_classes
from transfer.common.files import write_text
from transfer.common.paths import ARCHITECTURE, PREPARED, model_path
from transfer.common.run import run_stage
from transfer.common.settings import load_params
from transfer.model import build, check_blocks, fill, normalisation, save_weights
from transfer.pretrained import pretrained


def main() -> None:
    params = load_params()
    settings = params.model
    classes = load_classes(PREPARED)
    check_blocks(settings)
    text = describe(settings, len(classes))
    print(text.partition("EVERY PARAMETER")[0], flush=True)
    torch.manual_seed(params.seed)
    channels = normalisation(settings.name, settings.weights)
    network = build(settings, len(classes), channels)
    if settings.weights:
        state = pretrained(settings.name, settings.weights)
        fill(network.backbone, state, f"model.weights = {settings.weights}")
    save_weights(model_path("new"), network)
    write_text(ARCHITECTURE, text)


if __name__ == "__main__":
    run_stage("network", main)
