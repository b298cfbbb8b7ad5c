"""The training of both modes: check, prepare, resume; each epoch train, validate, log, keep."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from transfer.common.arrays import Split
from transfer.common.params import Params
from transfer.inference import predict, to_input
from transfer.model.backbone import folded, freeze
from transfer.model.network import Network
from transfer.training import checkpoint
from transfer.training.batches import (
    Batches,
    augmented,
    autocast,
    batches_of_epoch,
    cached_features,
    image_size_in,
)
from transfer.training.checks import (
    check_losses,
    check_memory,
    check_outputs,
    check_settings,
    check_unchanged,
)
from transfer.training.optimizer import Schedule, make_optimizers, make_schedules
from transfer.training.processes import from_first, process, share_of_data

Log = Callable[[int, dict[str, float]], None]


def train(
    network: Network,
    mode: str,
    data: Split,
    held_out: Split,
    params: Params,
    device: torch.device,
    log: Log,
    unfinished: Path | None = None,
) -> None:
    """Train `network` in place, in `mode` frozen or finetuned.

    After each epoch, `log` gets its number, from 1, and the mean loss and accuracy in training
    and on `held_out`. The state is then kept in the file `unfinished`, from which a call with the
    same arguments resumes; remove it when the result is safe. Where torchrun started several
    processes, each trains on its share of `data`, and only the first one logs and keeps.

    Raises InputError when a step cannot fit into memory, and when the result is of no use: the
    loss is not finite, a unit of the last layer is dead, a frozen backbone has changed.
    """
    check_settings(network, mode, data, params)
    network.to(device).to(memory_format=torch.channels_last)
    data = Split(*(tensor.to(device) for tensor in share_of_data(data)))
    learner_in, batches_of = prepare(network, mode, data, params)
    before = {key: value.clone() for key, value in network.backbone.state_dict().items()}

    epochs, rank = getattr(params.train, mode).epochs, process()[0]
    steps, _ = batches_of_epoch(len(data.labels), params)
    optimizers = make_optimizers(network, mode, params)
    rows = resume(network, optimizers, log, unfinished)
    schedules = make_schedules(optimizers, steps * epochs, steps * len(rows), params)

    for epoch in range(len(rows), epochs):
        name = f"{mode} epoch {epoch + 1}/{epochs}"
        bar = tqdm(batches_of(epoch), name, steps, leave=False, disable=None)
        values = train_one_epoch(name, learner_in(epoch), bar, optimizers, schedules, params)
        if rank > 0:
            continue
        size = image_size_in(epoch, mode, params)
        values |= validate(name, network, held_out, size)
        log(epoch + 1, values)
        rows.append((epoch + 1, values))
        if unfinished:
            states = [optimizer.state_dict() for optimizer in optimizers]
            kept = {"network": network.state_dict(), "optimizers": states, "rows": rows}
            checkpoint.save(unfinished, kept)
    if mode == "frozen":
        check_unchanged(network.backbone, before)


def prepare(
    network: Network, mode: str, data: Split, params: Params
) -> tuple[Callable[[int], nn.Module], Callable[[int], Batches]]:
    """What is trained in an epoch, and on which batches: two functions of the epoch, from 0.

    In mode frozen, the head on the features that the backbone extracts, once; in mode finetuned,
    the network on images. Raises InputError when a step cannot fit into memory.
    """
    one = to_input(data.images[:1], params.model.image_size)
    _, batch = batches_of_epoch(len(data.labels), params)

    @functools.cache
    def learner(fixed: bool) -> nn.Module:
        part: nn.Module = network.head if mode == "frozen" else network
        if fixed:
            part = Network(folded(network.backbone, one), network.head)
        return DistributedDataParallel(part) if process()[1] > 1 else part

    if mode == "frozen":
        freeze(network.backbone)
        check_memory(network.head, network.backbone(one), batch, params)
        features = cached_features(folded(network.backbone, one), data, params)
        return lambda _: learner(False), features
    check_memory(network, one, batch, params)
    settings = params.train.finetuned
    moving = round(settings.batch_norm_until * settings.epochs)
    return lambda epoch: learner(epoch >= moving), functools.partial(augmented, data, params)


def resume(
    network: Network, optimizers: list[torch.optim.Optimizer], log: Log, unfinished: Path | None
) -> list[tuple[int, dict[str, float]]]:
    """Bring `network` and `optimizers` to the state kept in `unfinished`, if there is one.

    Logs again, and returns, what was logged until then: the number and the values of each epoch.
    """
    rank = process()[0]
    kept: dict[str, Any] | None = checkpoint.load(unfinished) if unfinished and rank == 0 else None
    state = from_first(kept)
    if not state:
        return []
    network.load_state_dict(state["network"])
    for optimizer, kept_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept_state)
    if rank == 0:
        print(f"resuming after epoch {len(state['rows'])}, kept in {unfinished}", flush=True)
        for row in state["rows"]:
            log(*row)
    return state["rows"]


def train_one_epoch(
    name: str,
    learner: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizers: list[torch.optim.Optimizer],
    schedules: list[Schedule],
    params: Params,
) -> dict[str, float]:
    """Take one step on each batch (what `learner` takes, labels); the mean loss and accuracy.

    Raises InputError, in which `name` says which epoch it is, when the loss is not finite.
    """
    learner.train()
    losses, rates = [], []
    total_loss: Tensor | int = 0
    correct: Tensor | int = 0
    seen = 0
    for x, labels in batches:
        rates.append([group["lr"] for part in optimizers for group in part.param_groups])
        loss, hits = take_step(learner, x, labels, optimizers, schedules, params)
        losses.append(loss)
        total_loss += loss * len(labels)
        correct += hits
        seen += len(labels)
    check_losses(losses, rates, name)
    return {"train_loss": float(total_loss / seen), "train_accuracy": float(correct / seen)}


def take_step(
    learner: nn.Module,
    x: Tensor,
    labels: Tensor,
    optimizers: list[torch.optim.Optimizer],
    schedules: list[Schedule],
    params: Params,
) -> tuple[Tensor, Tensor]:
    """One step of the optimizers; the loss and the number of correct predictions, on the device."""
    with autocast(x.device, params):
        logits = learner(x)
        smoothing = params.train.shared.label_smoothing
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    learner.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    for schedule in schedules:
        schedule.step()
    return loss.detach(), (logits.argmax(1) == labels).sum()


def validate(name: str, network: nn.Module, held_out: Split, image_size: int) -> dict[str, float]:
    """Loss and accuracy on `held_out`, at the image size that the epoch has trained at.

    Raises InputError, in which `name` says which epoch it is, when an output is dead.
    """
    logits = predict(network, held_out.images, image_size)
    check_outputs(logits, name)
    labels = held_out.labels.cpu()
    return {
        "validation_loss": F.cross_entropy(logits, labels).item(),
        "validation_accuracy": (logits.argmax(1) == labels).double().mean().item(),
    }
