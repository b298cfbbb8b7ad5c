"""The prepared images: arrays on disk, random parts of them, augmentation, input of a network.

data/prepared/ holds {train,test}_images.npy, {train,test}_labels.npy, classes.json, and
test_names.json, which names the test images. For images of your own, train_keys.npy has a hash of
each training image's file.
"""

import json
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from transfer.run import PREPARED
from transfer.settings import InputError


class Split(NamedTuple):
    """Images, uint8 NHWC (N, H, W, 3), memory-mapped, their labels, int64 (N,), and, for images of
    your own, hashes of their files, int64 (N,).
    """

    images: Tensor
    labels: Tensor
    keys: Tensor | None = None


def load_split(name: str) -> Split:
    """The split "train" or "test"; its images are memory-mapped, so the system can evict them."""
    images = np.load(PREPARED / f"{name}_images.npy", mmap_mode="c")
    labels, keys = np.load(PREPARED / f"{name}_labels.npy"), PREPARED / f"{name}_keys.npy"
    return Split(
        torch.from_numpy(images),
        torch.from_numpy(labels),
        torch.from_numpy(np.load(keys)) if keys.exists() else None,
    )


def load_json(name: str) -> list[str]:
    """The names of the classes, in the order of the labels, or of the test images."""
    return json.loads((PREPARED / f"{name}.json").read_text(encoding="utf-8"))


def stratified(
    labels: Tensor, share: float, classes: list[str], seed: int, setting: str,
    keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Split the indices of `labels`, int64 (N,), in two: those that remain, in order, and a random
    `share` of each class; both int64. The share is rounded; at least one image is drawn, and one
    remains.

    If there are `keys`, int64 (N,), they decide instead of the `seed`: a new image moves at most
    one old image to the other part, and images with the same key are in the same part. Raises
    InputError, which names `setting`, if a class has too few images.
    """
    quotas = (share * labels.bincount(minlength=len(classes)).double()).round().clamp(min=1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if keys is not None:
        order = keys.argsort(stable=True)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in enumerate(quotas.int().tolist()):
        own = order[labels[order] == label]
        drawn[own[: min(quota, len(own) - 1)]] = True
    if keys is not None:
        drawn |= torch.isin(keys, keys[drawn])
    sides = [labels[side].bincount(minlength=len(classes)) for side in (drawn, ~drawn)]
    if few := [name for name, *counts in zip(classes, *sides, strict=True) if not all(counts)]:
        raise InputError(
            f"{setting} = {share:g}: needs 2 different images or more of {', '.join(few)}"
        )
    return (~drawn).nonzero().flatten(), order[drawn[order]]


def balanced(labels: Tensor, index: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the images at `index`, in order: equally many of each class, as far as possible.

    `index` and the result are int64. With the same `seed`, a larger set includes a smaller one.
    """
    classes = int(labels.max()) + 1
    if not classes <= count <= len(index):
        raise InputError(
            f"train.shared.images = {count}: must be at least {classes}, one of each class, and at "
            f"most {len(index)}, the training images without the validation images"
        )
    return interleaved(labels, index, seed)[:count].sort().values


def interleaved(labels: Tensor, index: Tensor, seed: int) -> Tensor:
    """`index`, int64 (n,), in random order, but the classes take turns."""
    order = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))]
    place = torch.empty_like(order)  # 0 for the first image of its class, 1 for the second, ...
    for label in labels.unique():
        same = labels[order] == label
        place[same] = torch.arange(int(same.sum()))
    return order[place.argsort(stable=True)]


def shift_and_flip(
    images: Tensor, index: Tensor, max_shift: int, flips: bool, generator: torch.Generator
) -> Tensor:
    """The images at `index`, each shifted at random by up to `max_shift` pixels. With `flips`, each
    is also mirrored with probability 0.5.

    `images` is uint8 NHWC on any device, and the result is on the same device. `generator` draws on
    the CPU, so the draws are the same on every device. Uncovered pixels are filled by reflection.
    """
    height, width = images.shape[1:3]

    def source(size: int) -> Tensor:  # where each row or column comes from: (n, size)
        shift = torch.randint(-max_shift, max_shift + 1, (len(index), 1), generator=generator)
        position = (torch.arange(size) + shift).abs()  # mirrored at the first pixel ...
        return (size - 1) - ((size - 1) - position).abs()  # ... and at the last

    rows, columns = source(height), source(width)
    flip = (torch.rand((len(index), 1), generator=generator) < 0.5) & flips
    columns = torch.where(flip, columns.flip(1), columns)
    # One gather moves each pixel once; a crop and a flip of each image would be many small copies.
    gather = (index[:, None, None], rows[:, :, None], columns[:, None, :])
    return images[tuple(i.to(images.device) for i in gather)]


def to_input(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 NHWC -> what a network takes: float32 NCHW, `size` pixels a side, channels last.

    `mean` and `std`, float32 (3,), are those of the channels on a scale of 0 to 1.
    """
    # Bilinear, with antialiasing when it shrinks, rounded to uint8 as Pillow does: several times
    # as fast as in float32.
    scaled = resize(images.permute(0, 3, 1, 2), [size, size])
    mean, std = (255 * value.view(1, 3, 1, 1) for value in (mean, std))
    return torch.addcmul(-mean / std, scaled, 1 / std)  # (scaled - mean) / std in one pass
