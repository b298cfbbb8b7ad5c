"""Stage `train@MODE`: train the head and, in mode `finetuned`, also the backbone."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from dvclive import Live

from transfer.common.dataset import balanced, load_classes, load_split, stratified
from transfer.common.files import replacing, write_json
from transfer.common.paths import PREPARED, curves_path, model_path, training_path
from transfer.common.run import run_stage
from transfer.common.settings import load_params
from transfer.inference import set_up_torch
from transfer.model import load_network, save_weights
from transfer.training.checkpoint import checkpoint_path
from transfer.training.loop import Log, train
from transfer.training.modes import make_mode
from transfer.training.processes import join, process_count, rank
from transfer.training.temperature import calibrate


@contextmanager
def learning_curves(mode: str) -> Iterator[Log]:
    """A function that logs an epoch's number and its values, for DVC's plots and on a line."""
    with (
        replacing(curves_path(mode)) as folder,
        Live(str(folder), dvcyaml=None, report=None, save_dvc_exp=False) as live,
    ):

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
    device = set_up_torch(params.train.device, params.train.threads)
    join(device)

    # Hold out validation images, and take as many others as asked for; the test split is not read.
    classes = load_classes(PREPARED)
    data = load_split(PREPARED, "train", classes)
    rest, drawn = stratified(
        data.labels, params.train.shared.validation_share, classes, params.seed,
        "train.shared.validation_share",
    )  # fmt: skip
    if count := params.train.shared.images:
        rest = balanced(data.labels, rest, count, params.seed, "train.shared.images")
    validation = data.take(drawn)

    torch.manual_seed(params.seed)  # for layers that draw, such as dropout
    # Fine-tuning starts where feature extraction ended: the random gradients of a new head would
    # distort the backbone (Kumar et al., "Fine-Tuning can Distort Pretrained Features", 2022).
    start = model_path(params.train.finetuned.start if mode == "finetuned" else "new")
    network = load_network(params.model, len(classes), start, device)
    network.temperature.fill_(1)  # it is fitted anew below
    inputs = [Path("params.yaml"), Path(__file__), start, PREPARED]
    unfinished = checkpoint_path(mode, inputs, device, process_count())
    learning = make_mode(mode, network, data.take(rest), params, device)
    if rank() > 0:
        train(learning, validation, lambda *_: None, unfinished)
        return
    with learning_curves(mode) as log:
        train(learning, validation, log, unfinished)
    temperature = calibrate(network, validation, params.model.image_size)
    counts = {"training_images": len(rest), "validation_images": len(drawn)}
    write_json(training_path(mode), counts | {"temperature": temperature})
    save_weights(model_path(mode), network)
    unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    [mode] = sys.argv[1:]
    run_stage(f"train@{mode}", lambda: main(mode), torchrun=True)
