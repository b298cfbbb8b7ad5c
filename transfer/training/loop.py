"""Training, epoch by epoch: train, validate, log, keep the state; and what makes it fail."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from transfer.common.dataset import Split
from transfer.common.errors import InputError
from transfer.common.settings import Params
from transfer.inference import autocast, predict
from transfer.model import Network, measure_blocks
from transfer.training import checkpoint
from transfer.training.modes import LAYERS, Batches, Mode, random_stream
from transfer.training.optimizer import Updates
from transfer.training.processes import from_first, rank

Log = Callable[[int, dict[str, float]], None]


def train(mode: Mode, validation: Split, log: Log, unfinished: Path | None = None) -> None:
    """Train the network of `mode` in place.

    After each epoch, `log` gets its number, from 1, and the mean loss, in nats, and accuracy in
    training and on `validation`. The state is then kept in the file `unfinished`, from which a
    call with the same arguments resumes; remove it when the result is safe. Of several processes
    that torchrun started, only the first one validates, logs and keeps.

    Raises InputError when the settings do not fit, and when the result is of no use: the loss is
    not finite, or a unit of the last layer is dead.
    """
    check_settings(mode)
    network, params, epochs = mode.network, mode.params, mode.settings.epochs
    updates = Updates(network, mode.peak_rates, params.train, mode.steps * epochs)
    rows = resume(network, updates, log, unfinished)

    for epoch in range(len(rows), epochs):
        # For layers that draw, such as dropout; in each epoch, so that resuming changes nothing.
        torch.manual_seed(random_stream(params.seed, LAYERS, epoch, rank()).initial_seed())
        name = f"{mode.name} epoch {epoch + 1}/{epochs}"
        bar = tqdm(mode.batches(epoch), name, mode.steps, leave=False, disable=None)
        values = train_one_epoch(name, mode.learner(epoch), bar, updates, params)
        if rank() > 0:
            continue
        # At the epoch's image size: BatchNorm's statistics are those of features at this size.
        logits = predict(network, validation.images, mode.image_size(epoch))
        if epoch + 1 == epochs:  # until then, units that are dead may recover
            check_outputs(logits, name)
        labels = validation.labels.cpu()
        values["validation_loss"] = F.cross_entropy(logits, labels).item()
        values["validation_accuracy"] = (logits.argmax(1) == labels).double().mean().item()
        log(epoch + 1, values)
        rows.append((epoch + 1, values))
        if unfinished:
            kept = {"network": network.state_dict(), "updates": updates.state(), "rows": rows}
            checkpoint.save(unfinished, kept)


def resume(
    network: Network, updates: Updates, log: Log, unfinished: Path | None
) -> list[tuple[int, dict[str, float]]]:
    """Bring `network` and `updates` to the state kept in `unfinished`, if there is one.

    Logs again, and returns, what was logged until then: the number and the values of each epoch.
    """
    state = from_first(checkpoint.load(unfinished) if unfinished and rank() == 0 else None)
    if not state:
        return []
    network.load_state_dict(state["network"])
    updates.load_state(state["updates"])
    if rank() == 0:
        print(f"resuming after epoch {len(state['rows'])}, kept in {unfinished}", flush=True)
        for row in state["rows"]:
            log(*row)
    return state["rows"]


def train_one_epoch(
    name: str, learner: nn.Module, batches: Batches, updates: Updates, params: Params
) -> dict[str, float]:
    """Take one step on each batch (what `learner` takes, labels); the mean loss and accuracy.

    Raises InputError, in which `name` says which epoch it is, when the loss is not finite.
    """
    losses, rates = [], []
    # Sums stay on the device: to read them in each step would make the processor wait for a GPU.
    total_loss: Tensor | int = 0
    correct: Tensor | int = 0
    seen = 0
    for x, labels in batches:
        rates.append(updates.current_rates())
        with autocast(x.device, params.train.bf16):
            logits = learner(x)
            smoothing = params.train.shared.label_smoothing
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        learner.zero_grad()
        loss.backward()
        updates.step()
        losses.append(loss.detach())
        total_loss += losses[-1] * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
    check_losses(losses, rates, name)
    return {"train_loss": float(total_loss / seen), "train_accuracy": float(correct / seen)}


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


def check_losses(losses: list[Tensor], rates: list[list[float]], where: str) -> None:
    """Raise InputError, which says `where`, when a loss of an epoch's steps is not finite.

    `rates` are the learning rates of each step. Done once an epoch, as it waits for the device.
    """
    values = torch.stack(losses)
    if bad := (~values.isfinite()).nonzero().flatten().tolist():
        step = bad[0]
        shown = " and ".join(f"{rate:.3g}" for rate in dict.fromkeys(rates[step]))
        raise InputError(
            f"{where}, step {step + 1}: the loss is {values[step].item()} at learning rates "
            f"{shown}; lower them in params.yaml"
        )


def check_outputs(logits: Tensor, where: str) -> None:
    """Raise InputError, which says `where`, when a unit of the last layer is dead."""
    if dead := (logits == logits[0]).all(0).nonzero().flatten().tolist():
        raise InputError(
            f"{where}: outputs {dead} of the head are dead units, with the same value for every "
            "image; lower the learning rates in params.yaml"
        )
