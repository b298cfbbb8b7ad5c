"""The optimizers, with a learning rate for each part of the network, and its schedule."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from transfer.common.settings import TrainSettings
from transfer.model import Network


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
    """Approximately the nearest orthogonal matrix to a matrix (m, n).

    `steps` Newton-Schulz iterations with the coefficients of Jordan et al. After three, large
    singular values have come near 1; small ones have grown, but not to 1.
    """
    # Of a wide matrix, the product with its transpose is the smaller one.
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def make_optimizers(
    network: Network, peak_rates: dict[str, float], settings: TrainSettings
) -> list[torch.optim.Optimizer]:
    """Muon for the head's convolutions, if it has any, and AdamW for the rest.

    `peak_rates` are the learning rates of "muon", and of AdamW for "head" and, if it learns, for
    "backbone". AdamW's weight decay is only for the weights of the backbone's layers, not for
    biases, nor for BatchNorm's scales and shifts. The head's last layer has none either: it would
    hold the layer away from its optimum (a linear head loses 2 points).
    """
    convolutions = [p for p in network.head.parameters() if p.ndim == 4]
    others = [p for p in network.head.parameters() if p.ndim != 4]
    groups = [{"params": others, "lr": peak_rates["head"], "weight_decay": 0.0}]
    if peak := peak_rates.get("backbone"):
        for decay, decays in ((settings.finetuned.weight_decay, True), (0.0, False)):
            chosen = [p for p in network.backbone.parameters() if (p.ndim > 1) == decays]
            groups.append({"params": chosen, "lr": peak, "weight_decay": decay})
    adamw = torch.optim.AdamW(groups, fused=True)  # all parameters in one call, much faster
    muon = [Muon(convolutions, peak_rates["muon"])] if convolutions else []
    return [*muon, adamw]


class ScheduledOptimizers:
    """The optimizers of a network and the schedule of their learning rates over `steps` steps."""

    def __init__(
        self, network: Network, peak_rates: dict[str, float], settings: TrainSettings, steps: int
    ):
        factor = functools.partial(slanted_triangle, steps=steps, warm_up=settings.shared.warm_up)
        self.optimizers = make_optimizers(network, peak_rates, settings)
        schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in self.optimizers]
        self.parts: list[Any] = [*self.optimizers, *schedules]

    def step(self) -> None:
        """Change the parameters by their gradients, then the learning rates."""
        for part in self.parts:
            part.step()

    def state(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state(self, state: list[dict[str, Any]]) -> None:
        """Go on from what `state` returned."""
        for part, values in zip(self.parts, state, strict=True):
            part.load_state_dict(values)


def slanted_triangle(step: int, steps: int, warm_up: float) -> float:
    """A learning rate as a fraction of its peak: linear warm-up in the first `warm_up` of the
    steps, then linear decay (Howard and Ruder, "Universal Language Model Fine-tuning", 2018,
    section 3.2).
    """
    peak = max(1, round(warm_up * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))
