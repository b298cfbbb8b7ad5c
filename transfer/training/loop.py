"""Training, epoch by epoch: train, validate, print, keep the state; and what makes it fail."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from transfer.common.dataset import Split
from transfer.common.errors import InputError
from transfer.common.settings import Params
from transfer.inference import autocast, predict
from transfer.model import measure_blocks
from transfer.training import checkpoint
from transfer.training.modes import LAYERS, Batches, Mode, random_stream
from transfer.training.optimizer import ScheduledOptimizers
from transfer.training.processes import from_first, rank

Row = dict[str, float]  # of the table of epochs: the number, from 1, losses and accuracies


def train(mode: Mode, validation: Split, unfinished: Path | None = None) -> list[Row]:
    """Train the network of `mode` in place.

    Returns, and prints after each epoch, its mean loss, in nats, and accuracy in training and on
    `validation`. The state is then kept in the file `unfinished`, from which a call with the same
    arguments resumes; remove it when the result is safe. Of several processes that torchrun
    started, only the first one validates, prints and keeps.

    Raises InputError when the settings do not fit, and when the result is of no use: a loss is not
    finite, or a logit is the same for all images.
    """
    check_settings(mode)
    network, params, epochs = mode.network, mode.params, mode.settings.epochs
    steps = mode.steps * epochs
    optimizers = ScheduledOptimizers(network, mode.peak_rates, params.train, steps)
    rows = resume(mode, optimizers, unfinished)

    for epoch in range(len(rows), epochs):
        # For layers that draw, such as dropout; in each epoch, so that resuming changes nothing.
        torch.manual_seed(random_stream(params.seed, LAYERS, epoch, rank()).initial_seed())
        name = f"{mode.name} epoch {epoch + 1}/{epochs}"
        batches = tqdm(mode.batches(epoch), name, mode.steps, leave=False, disable=None)
        learned = train_one_epoch(mode.learner(epoch), batches, optimizers, params)
        found, problem = validate(mode, validation, epoch) if rank() == 0 else ({}, "")
        if problem := from_first(problem):  # all processes fail, so that none waits for another
            raise InputError(f"{name}: {problem}; lower the learning rates of train.{mode.name}")
        rows.append({"epoch": epoch + 1} | learned | found)
        if rank() == 0:
            print_row(mode.name, rows[-1])
        if rank() == 0 and unfinished:
            state = {"network": network.state_dict(), "optimizers": optimizers.state()}
            checkpoint.save(unfinished, state | {"rows": rows})
    return rows


def print_row(mode: str, row: Row) -> None:
    values = " ".join(f"{name} {row[name]:.4f}" for name in row if name != "epoch")
    print(f"{mode} epoch {row['epoch']}: {values}", flush=True)


def resume(mode: Mode, optimizers: ScheduledOptimizers, unfinished: Path | None) -> list[Row]:
    """Bring the network and its `optimizers` to the state kept in `unfinished`, if there is one.

    Returns, and prints again, the rows of the epochs until then.
    """
    state = from_first(checkpoint.load(unfinished) if unfinished and rank() == 0 else None)
    if not state:
        return []
    mode.network.load_state_dict(state["network"])
    optimizers.load_state(state["optimizers"])
    if rank() == 0:
        print(f"resuming after epoch {len(state['rows'])}, kept in {unfinished}", flush=True)
        for row in state["rows"]:
            print_row(mode.name, row)
    return state["rows"]


def train_one_epoch(
    learner: nn.Module, batches: Batches, optimizers: ScheduledOptimizers, params: Params
) -> dict[str, float]:
    """Take one step on each batch (what `learner` takes, labels); the mean loss and accuracy."""
    # Sums stay on the device: to read them in each step would make the processor wait for a GPU.
    total_loss: Tensor | int = 0
    correct: Tensor | int = 0
    seen = 0
    for x, labels in batches:
        with autocast(x.device, params.train.bf16):
            logits = learner(x)
            smoothing = params.train.shared.label_smoothing
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        learner.zero_grad()
        loss.backward()
        optimizers.step()
        total_loss += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
    return {"train_loss": float(total_loss / seen), "train_accuracy": float(correct / seen)}


def validate(mode: Mode, validation: Split, epoch: int) -> tuple[dict[str, float], str]:
    """The mean loss and accuracy on `validation` after `epoch`; and why the network is of no use,
    "" if it is of use.
    """
    # At the epoch's image size: the head's BatchNorm has statistics of features at this size.
    logits = predict(mode.network, validation.images, mode.image_size(epoch))
    labels = validation.labels.cpu()
    loss = F.cross_entropy(logits, labels).item()
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    problem, last = "", epoch + 1 == mode.settings.epochs
    if not math.isfinite(loss):
        problem = "the loss is not finite"
    elif last and (logits == logits[0]).all(0).any():  # earlier, it may recover
        problem = "a logit is the same for all validation images"
    return {"validation_loss": loss, "validation_accuracy": accuracy}, problem


def check_settings(mode: Mode) -> None:
    """Raise InputError where the settings do not fit the images or the backbone."""
    shared = mode.params.train.shared
    side = min(mode.data.images.shape[1:3])
    if shared.max_shift >= side:
        raise InputError(
            f"train.shared.max_shift = {shared.max_shift}: the images have only {side} pixels a "
            "side"
        )
    smallest = mode.image_size(0)
    block = {"backbone": mode.network.backbone}
    if measure_blocks(block, smallest, mode.data.images.device)["backbone"].shape is None:
        raise InputError(
            f"train.finetuned.initial_scale = {mode.params.train.finetuned.initial_scale:g}: the "
            f"backbone makes no feature map of images of {smallest} pixels a side, as the first "
            "epoch has them; raise it"
        )
