"""Stage `train@MODE`: train the head and, in mode `finetuned`, also the backbone."""

import sys
from pathlib import Path

from transfer.common.dataset import balanced, load_classes, load_split, stratified
from transfer.common.files import write_csv, write_json
from transfer.common.paths import PREPARED, curves_path, model_path, training_path
from transfer.common.run import run_stage
from transfer.common.settings import load_params
from transfer.inference import set_up_torch
from transfer.model import load_network, save_weights
from transfer.training.checkpoint import checkpoint_path
from transfer.training.loop import train
from transfer.training.modes import make_mode
from transfer.training.processes import join, process_count, rank
from transfer.training.temperature import calibrate


def main(mode: str) -> None:
    params = load_params()
    device = set_up_torch(params.train.device, params.train.threads)
    join(device)

    # Hold out validation images, and take as many others as asked for; the test split is not read.
    classes = load_classes(PREPARED)
    data = load_split(PREPARED, "train", classes)
    training, validation = stratified(
        data.labels, params.train.shared.validation_share, classes, params.seed,
        "train.shared.validation_share",
    )  # fmt: skip
    if count := params.train.shared.images:
        training = balanced(data.labels, training, count, params.seed, "train.shared.images")

    # Fine-tuning starts where feature extraction ended: the random gradients of a new head would
    # distort the backbone (Kumar et al., "Fine-Tuning can Distort Pretrained Features", 2022).
    start = model_path(params.train.finetuned.start if mode == "finetuned" else "new")
    network = load_network(params.model, len(classes), start, device)
    network.temperature.fill_(1)  # mode frozen has fitted it; training needs undivided logits
    files = [Path("params.yaml"), Path(__file__), start, PREPARED]
    unfinished = checkpoint_path(mode, files, device, process_count())

    learning = make_mode(mode, network, data.take(training), params, device)
    rows = train(learning, data.take(validation), unfinished)
    if rank() > 0:
        return
    write_csv(curves_path(mode), rows)
    temperature = calibrate(network, data.take(validation), params.model.image_size)
    counts = {"training_images": len(training), "validation_images": len(validation)}
    write_json(training_path(mode), counts | {"temperature": temperature})
    save_weights(model_path(mode), network)
    unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    [mode] = sys.argv[1:]
    run_stage(f"train@{mode}", lambda: main(mode), torchrun=True)
