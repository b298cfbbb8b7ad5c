"""Stage `train@MODE`: learn the head, and in mode `finetuned` the backbone too."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from dvclive import Live

from transfer import checkpoint, data, model, params, training
from transfer.command import machine, run_stage

BACKBONE = Path("models/backbone.safetensors")
ARRAYS = Path("data/cifar10")


@contextmanager
def curves(mode: str) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A function that logs an epoch's number and its values, for DVC's plots and on a line."""
    with Live(f"metrics/curves/{mode}", dvcyaml=None, report=None, save_dvc_exp=False) as live:

        def log(epoch: int, values: dict[str, float]) -> None:
            live.step = epoch
            for name, value in values.items():
                live.log_metric(name, value)
            live.make_summary()
            print(
                f"{mode} epoch {epoch}:", *(f"{k} {v:.4f}" for k, v in values.items()), flush=True
            )

        yield log


def unfinished(mode: str, *facts: object) -> Path:
    """Where the state of unfinished training is kept: named by everything that decides the result.

    DVC runs experiments in copies of the project at ROOT/.dvc/tmp/exps/; they keep it in ROOT, so
    that it outlives them.
    """
    code = [Path(__file__), *Path(params.__file__).parent.glob("*.py")]
    inputs = [BACKBONE, ARRAYS / "SHA256SUMS", Path("params.yaml")]
    contents = checkpoint.key([*code, *inputs], mode, machine(), *facts)
    root, *_ = str(Path.cwd()).partition(f"{os.sep}.dvc{os.sep}tmp{os.sep}exps{os.sep}")
    return Path(root, ".checkpoints", f"{mode}-{contents}")


def main(mode: str) -> None:
    settings = params.load()
    device = training.set_up(settings.train.device, settings.train.threads)
    classes = data.load_classes(ARRAYS)
    pictures = data.load_split(ARRAYS, "train", classes)
    parts = data.hold_out(pictures, settings.data.validation, settings.seed)
    for part, what in zip(parts, ("left for training", "held out"), strict=True):
        data.require_all(part, classes, f"data.validation = {settings.data.validation}: {what}")
    torch.manual_seed(settings.seed)
    network = model.build(settings.model, len(classes))
    model.fill(network.backbone, model.load_state(BACKBONE), str(BACKBONE))
    rank, processes = training.process()
    state = unfinished(mode, device, processes)
    with curves(mode) if rank == 0 else nullcontext() as log:
        training.train(network, mode, *parts, settings, device, log, state)
    if rank == 0:
        model.save_state(Path(f"models/{mode}.safetensors"), network)
        state.unlink(missing_ok=True)


if __name__ == "__main__":
    [mode] = sys.argv[1:]
    run_stage(f"train@{mode}", lambda: main(mode))
