"""Stage `backbone`: the pretrained, cut feature extractor, and a description of the model."""

from pathlib import Path

import torch

from transfer import data, description, model, params
from transfer.command import run_stage
from transfer.files import write_text


def main() -> None:
    settings = params.load()
    classes = data.load_classes(Path("data/cifar10"))
    torch.manual_seed(settings.seed)
    text = description.describe(settings.model, len(classes))
    print(text.partition("EVERY PARAMETER")[0], flush=True)
    backbone = model.cut(model.classifier(settings.model.name), settings.model.blocks)
    if weights := settings.model.weights:
        model.fill(
            backbone, model.pretrained(settings.model.name, weights), f"model.weights = {weights}"
        )
    model.save_state(Path("models/backbone.safetensors"), backbone)
    write_text(Path("metrics/architecture.txt"), text)


if __name__ == "__main__":
    run_stage("backbone", main)
