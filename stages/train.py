"""Stage `train@MODE`: learn the head, and in mode `finetuned` the backbone too."""

import sys
from pathlib import Path

import torch
from dvclive import Live

from transfer import data, model, params, training
from transfer.command import run_stage

BACKBONE = Path("models/backbone.safetensors")
ARRAYS = Path("data/cifar10")


def main(mode: str) -> None:
    settings = params.load()
    device = training.set_up(settings.train.device, settings.train.threads)
    classes = data.load_classes(ARRAYS)
    learned, held_out = data.hold_out(
        data.load_split(ARRAYS, "train"), settings.data.validation, settings.seed
    )
    torch.manual_seed(settings.seed)
    network = model.build(settings.model, len(classes))
    model.fill(network.backbone, model.load_state(BACKBONE), str(BACKBONE))
    with Live(f"metrics/curves/{mode}", dvcyaml=None, report=None, save_dvc_exp=False) as live:

        def log(epoch: int, values: dict[str, float]) -> None:
            live.step = epoch
            for name, value in values.items():
                live.log_metric(name, value)
            live.make_summary()
            print(
                f"{mode} epoch {epoch}:", *(f"{k} {v:.4f}" for k, v in values.items()), flush=True
            )

        training.train(network, mode, learned, held_out, settings, device, log)
    model.save_state(Path(f"models/{mode}.safetensors"), network)


if __name__ == "__main__":
    [mode] = sys.argv[1:]
    run_stage(f"train@{mode}", lambda: main(mode))
