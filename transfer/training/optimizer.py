"""The optimizers, with a learning rate for each part of the network, and how it changes."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from transfer.common.params import Params
from transfer.model.network import Network

Schedule = torch.optim.lr_scheduler.LRScheduler


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates, for the weights of convolutions.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. torch.optim.Muon
    takes matrices only; here a weight (out, in, h, w) counts as a matrix (out, in * h * w).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float):
        super().__init__(parameters, {"lr": lr, "momentum": 0.6, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"]).flatten(1)
                scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                update = orthogonalise(update).view(weight.shape)
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor, steps: int = 3) -> Tensor:
    """A matrix (m, n) near the orthogonal one that is nearest: its singular values come near 1.

    Newton-Schulz iterations with the coefficients of Jordan et al.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def make_optimizers(network: Network, mode: str, params: Params) -> list[torch.optim.Optimizer]:
    """Muon for the head's convolutions, if it has any, and AdamW for the rest.

    Head and backbone each have their own peak learning rate. As usual, only weights decay, not
    biases nor BatchNorm's scales and shifts.
    """
    convolutions = [p for p in network.head.parameters() if p.ndim == 4]
    peaks = {"head": getattr(params.train, mode).head_lr}
    if mode == "finetuned":
        peaks["backbone"] = params.train.finetuned.backbone_lr
    groups = []
    for part, peak in peaks.items():
        trained = list(network.get_submodule(part).parameters())
        weights = [p for p in trained if p.ndim > 1 and (part != "head" or p.ndim != 4)]
        decay = params.train.shared.weight_decay
        groups.append({"params": weights, "lr": peak, "weight_decay": decay})
        others = [p for p in trained if p.ndim <= 1]
        groups.append({"params": others, "lr": peak, "weight_decay": 0.0})
    try:
        adamw = torch.optim.AdamW(groups, fused=True)
    except RuntimeError:  # not on every accelerator
        adamw = torch.optim.AdamW(groups)
    muon = [Muon(convolutions, params.train.shared.muon_lr)] if convolutions else []
    return [*muon, adamw]


def make_schedules(
    optimizers: list[torch.optim.Optimizer], steps: int, done: int, params: Params
) -> list[Schedule]:
    """The learning rates over `steps` steps, of which `done` have been taken."""
    share = functools.partial(slanted_triangle, steps=steps, warm_up=params.train.shared.warm_up)
    schedule = torch.optim.lr_scheduler.LambdaLR
    return [schedule(optimizer, share, last_epoch=done - 1) for optimizer in optimizers]


def slanted_triangle(step: int, steps: int, warm_up: float) -> float:
    """The share of its peak that a learning rate has: up in the first `warm_up` of the steps, then
    down (Howard and Ruder, "Universal Language Model Fine-tuning", 2018, section 3.2).
    """
    peak = max(1, round(warm_up * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))
