"""AdamW with a learning rate for each part of the network, and how it changes over the steps."""

import functools

import torch
from torch import nn

from transfer.common.params import Params

Schedule = torch.optim.lr_scheduler.LRScheduler


def make_optimizer(network: nn.Module, mode: str, params: Params) -> torch.optim.Optimizer:
    """AdamW; the parameters of head and backbone each with their own peak learning rate.

    As usual, only weights decay, not biases nor BatchNorm's scales and shifts.
    """
    peaks = {"head": getattr(params.train, mode).head_lr}
    if mode == "finetuned":
        peaks["backbone"] = params.train.finetuned.backbone_lr
    groups = []
    for part, peak in peaks.items():
        trained = list(network.get_submodule(part).parameters())
        for decay, chosen in (
            (params.train.shared.weight_decay, [p for p in trained if p.ndim > 1]),
            (0.0, [p for p in trained if p.ndim <= 1]),
        ):
            groups.append({"params": chosen, "lr": peak, "weight_decay": decay})
    try:
        return torch.optim.AdamW(groups, fused=True)
    except RuntimeError:  # not on every accelerator
        return torch.optim.AdamW(groups)


def make_schedule(
    optimizer: torch.optim.Optimizer, steps: int, done: int, params: Params
) -> Schedule:
    """The learning rates over `steps` steps, of which `done` have been taken."""
    share = functools.partial(slanted_triangle, steps=steps, warm_up=params.train.shared.warm_up)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, share, last_epoch=done - 1)


def slanted_triangle(step: int, steps: int, warm_up: float) -> float:
    """The share of its peak that a learning rate has: up in the first `warm_up` of the steps, then
    down (Howard and Ruder, "Universal Language Model Fine-tuning", 2018, section 3.2).
    """
    peak = max(1, round(warm_up * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))
