"""Muon for the convolutions of the head, AdamW for the rest, and their learning-rate schedule."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from transfer.model import Network
from transfer.settings import FinetunedSettings, FrozenSettings


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
    """Approximately the nearest orthogonal matrix to a matrix (m, n), by Newton-Schulz iterations.

    After three, large singular values have come near 1; small ones have grown, but not to 1.
    """
    # Of a wide matrix, the product with its transpose is the smaller one.
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def make_optimizers(
    network: Network, settings: FrozenSettings | FinetunedSettings, warm_up: float, steps: int
) -> list[Any]:
    """The optimizers for `steps` steps, then their schedules: call `step` of each, in order."""
    convolutions = [p for p in network.head.parameters() if p.ndim == 4]
    others = [p for p in network.head.parameters() if p.ndim != 4]
    # Weight decay would hold the last layer away from its optimum: a linear head loses 2 points.
    groups = [{"params": others, "lr": settings.head_lr, "weight_decay": 0.0}]
    if isinstance(settings, FinetunedSettings):
        # Biases and BatchNorm's scales and shifts do not decay.
        for decay, decays in ((settings.weight_decay, True), (0.0, False)):
            chosen = [p for p in network.backbone.parameters() if (p.ndim > 1) == decays]
            groups.append({"params": chosen, "lr": settings.backbone_lr, "weight_decay": decay})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, fused=True)]
    if convolutions:
        optimizers.insert(0, Muon(convolutions, settings.muon_lr))

    def factor(step: int) -> float:
        return slanted_triangle(step, steps, warm_up)

    return [*optimizers, *(torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers)]


def slanted_triangle(step: int, steps: int, warm_up: float) -> float:
    """A share of the peak: it rises in the first `warm_up` of the steps, then falls, both linearly
    (Howard and Ruder, "Universal Language Model Fine-tuning", 2018, section 3.2).
    """
    peak = max(1, round(warm_up * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))
