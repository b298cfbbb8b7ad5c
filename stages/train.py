"""Stage `train@MODE`: train the head, and in mode `finetuned` the backbone, too."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from dvclive import Live

from transfer.common.arrays import PREPARED, load_classes, load_split
from transfer.common.files import write_json
from transfer.common.params import load_params
from transfer.common.stage import run_stage
from transfer.inference import choose_device
from transfer.model.network import build, fill, load_weights, save_weights
from transfer.splits import balanced, stratified
from transfer.training.checkpoint import checkpoint_path
from transfer.training.loop import Log, train
from transfer.training.processes import join, process
from transfer.training.temperature import calibrate

BACKBONE = Path("models/backbone.safetensors")


@contextmanager
def learning_curves(mode: str, first: bool) -> Iterator[Log]:
    """A function that logs an epoch's number and its values, for DVC's plots and on a line.

    Only the `first` of several processes logs.
    """
    if not first:
        yield lambda *_: None
        return
    with Live(f"metrics/curves/{mode}", dvcyaml=None, report=None, save_dvc_exp=False) as live:

        def log(epoch: int, values: dict[str, float]) -> None:
            live.step = epoch
            for name, value in values.items():
                live.log_metric(name, value)
            live.make_summary()
            line = " ".join(f"{name} {value:.4f}" for name, value in values.items())
            print(f"{mode} epoch {epoch}: {line}", flush=True)

        yield log


def main(mode: str) -> None:
    params = load_params()
    device = choose_device(params.train.device, params.train.threads)
    join(device)
    rank, processes = process()

    # Hold out images to validate on, and take as many as asked for; the test split is not read.
    classes = load_classes(PREPARED)
    data = load_split(PREPARED, "train", classes)
    rest, held_out = stratified(
        data.labels, params.train.shared.validation_share, classes, params.seed,
        "train.shared.validation_share",
    )  # fmt: skip
    if count := params.train.shared.images:
        rest = balanced(data.labels, rest, count, params.seed, "train.shared.images")

    torch.manual_seed(params.seed)
    network = build(params.model, len(classes))
    fill(network.backbone, load_weights(BACKBONE), str(BACKBONE))
    inputs = [Path("params.yaml"), Path(__file__), BACKBONE, PREPARED]
    unfinished = checkpoint_path(mode, inputs, device, processes)
    with learning_curves(mode, rank == 0) as log:
        validation = data.take(held_out)
        train(network, mode, data.take(rest), validation, params, device, log, unfinished)
    if rank == 0:
        temperature = calibrate(network, validation, params.model.image_size)
        write_json(Path(f"metrics/temperature/{mode}.json"), {"temperature": temperature})
        save_weights(Path(f"models/{mode}.safetensors"), network)
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    [mode] = sys.argv[1:]
    run_stage(f"train@{mode}", lambda: main(mode))
