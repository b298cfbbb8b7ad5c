"""Drawing part of a data set at random, with each class in proportion."""

import math

import numpy as np
import torch
from torch import Tensor

from transfer.common.errors import InputError


def stratified(
    labels: Tensor, share: float, classes: list[str], seed: int, setting: str
) -> tuple[Tensor, Tensor]:
    """The indices of all but a `share` of `labels`, in order, and those of the share, at random.

    Each class has its proportional part of both, and at least one image in each. `labels` is int64
    (N,), both results int64. Raises InputError, which names `setting`, where that is impossible.
    """
    counts = labels.bincount(minlength=len(classes)).numpy()
    if (counts < 2).any():
        few = [name for name, count in zip(classes, counts, strict=True) if count < 2]
        raise InputError(f"{setting} = {share:g}: needs 2 images or more of {', '.join(few)}")
    total = round(share * len(labels))
    most = len(labels) - len(classes)
    if not len(classes) <= total <= most:
        raise InputError(
            f"{setting} = {share:g}: draws {total} of {len(labels)} images; at least one of each "
            f"of the {len(classes)} classes must be drawn and one left: take "
            f"{math.ceil(1000 * len(classes) / len(labels)) / 1000:g} to "
            f"{math.floor(1000 * most / len(labels)) / 1000:g}"
        )
    quota = _quotas(counts, total)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label, wanted in enumerate(quota.tolist()):
        drawn[order[labels[order] == label][:wanted]] = True
    return (~drawn).nonzero().flatten(), order[drawn[order]]


def balanced(labels: Tensor, index: Tensor, count: int, seed: int, setting: str) -> Tensor:
    """`count` of the images at `index`, in order: at random, as equally many of each class as
    there are. With the same `seed`, more images include those that fewer would be.

    `labels` is int64 (N,), `index` and the result too. Raises InputError, which names `setting`,
    where there are too few images, or fewer are asked for than there are classes.
    """
    classes = int(labels.max()) + 1
    if not classes <= count <= len(index):
        raise InputError(
            f"{setting} = {count}: must be at least {classes}, one of each class, and at most the "
            f"{len(index)} training images that are not held out"
        )
    order = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))]
    place = torch.empty_like(order)  # among the images of the same class
    for label in range(classes):
        same = labels[order] == label
        place[same] = torch.arange(int(same.sum()))
    return order[place.argsort(stable=True)[:count]].sort().values


def _quotas(counts: np.ndarray, total: int) -> np.ndarray:
    """How many of each class to draw: proportional, `total` in sum, 1 to count - 1 of each.

    By largest remainders; where the bounds bind, what is left goes to the classes that are furthest
    below their exact part.
    """
    exact = counts * total / counts.sum()
    quota = np.clip(np.floor(exact).astype(int), 1, counts - 1)
    while quota.sum() != total:
        step = 1 if quota.sum() < total else -1
        possible = (quota < counts - 1) if step > 0 else (quota > 1)
        behind = np.where(possible, step * (exact - quota), -np.inf)
        quota[behind.argmax()] += step
    return quota
