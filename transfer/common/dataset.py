"""The prepared data set: plain arrays on disk, the names of the classes, and random parts of it.

data/prepared/ holds {train,test}_{images,labels}.npy and classes.json.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transfer.common.errors import InputError
from transfer.common.files import replacing, write_json


class Split(NamedTuple):
    """Images and their labels: uint8 NHWC (N, H, W, 3), and int64 (N,)."""

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> "Split":
        """The images and labels at `index`, in its order."""
        return Split(self.images[index], self.labels[index])


def write_dataset(folder: Path, splits: dict[str, Split], classes: list[str]) -> None:
    """Write the "train" and "test" `splits` and the class names into `folder`, all or nothing."""
    with replacing(folder) as new:
        new.mkdir()
        for name, split in splits.items():
            for kind, tensor in split._asdict().items():
                np.save(new / f"{name}_{kind}.npy", tensor.numpy())
        write_json(new / "classes.json", classes)


def load_split(folder: Path, name: str, classes: list[str]) -> Split:
    """Memory-map the "train" or the "test" split that `write_dataset` wrote.

    Raises InputError, which names the file, when one is missing or damaged, or when a class has no
    image.
    """
    kinds = {"images": (np.uint8, 4), "labels": (np.int64, 1)}
    tensors = {}
    for kind, (dtype, dimensions) in kinds.items():
        path = folder / f"{name}_{kind}.npy"
        try:
            array = np.load(path, mmap_mode="c")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path}: {error}; run dvc repro download") from None
        if array.dtype != dtype or array.ndim != dimensions or not array.size:
            raise InputError(f"{path}: holds no {kind}; run dvc repro download")
        tensors[kind] = torch.from_numpy(array)
    split = Split(**tensors)
    path = folder / f"{name}_labels.npy"
    wrong = not 0 <= int(split.labels.min()) <= int(split.labels.max()) < len(classes)
    if wrong or len(split.images) != len(split.labels):
        raise InputError(f"{path}: does not fit {name}_images.npy or classes.json; run dvc repro")
    require_all(split.labels, classes, str(path))
    return split


def load_classes(folder: Path) -> list[str]:
    """The names of the classes in the order of the labels."""
    path = folder / "classes.json"
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; run dvc repro download") from None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"{path}: holds no list of names; run dvc repro download")
    return classes


def require_all(labels: Tensor, classes: list[str], where: str) -> None:
    """Raise InputError, which starts with `where`, unless each class has an image in `labels`."""
    counts = labels.bincount(minlength=len(classes)).tolist()
    if missing := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise InputError(f"{where}: there is no image of {', '.join(missing)}")


def select_classes(split: Split, names: list[str], wanted: list[str]) -> Split:
    """Only the images of the `wanted` classes; labels become indices into `wanted`."""
    if unknown := [name for name in wanted if name not in names]:
        raise InputError(f"data.classes: no class {unknown[0]!r}; there are {', '.join(names)}")
    index = torch.full((len(names),), -1)
    index[[names.index(name) for name in wanted]] = torch.arange(len(wanted))
    labels = index[split.labels]
    return Split(split.images[labels >= 0], labels[labels >= 0])


def stratified(
    labels: Tensor, share: float, classes: list[str], seed: int, setting: str
) -> tuple[Tensor, Tensor]:
    """The indices of `labels` in two parts: what is left, in order; and a drawn `share`, in random
    order.

    The share is rounded for each class; at least one image of each is drawn, and one left. `labels`
    is int64 (N,), both results int64. Raises InputError, which names `setting`, where that is
    impossible.
    """
    counts = labels.bincount(minlength=len(classes))
    if few := [name for name, count in zip(classes, counts, strict=True) if count < 2]:
        raise InputError(f"{setting} = {share:g}: needs 2 images or more of {', '.join(few)}")
    quotas = (share * counts.double()).round().clamp(min=1).minimum(counts - 1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in enumerate(quotas.int().tolist()):
        drawn[order[labels[order] == label][:quota]] = True
    return (~drawn).nonzero().flatten(), order[drawn[order]]


def balanced(labels: Tensor, index: Tensor, count: int, seed: int, setting: str) -> Tensor:
    """`count` of the images at `index`, drawn at random and returned in order: equally many of each
    class, as far as there are enough. With the same `seed`, more images include the fewer.

    `labels` is int64 (N,); `index` and the result are also int64. Raises InputError, which names
    `setting`, when there are too few images, or when fewer are asked for than there are classes.
    """
    classes = int(labels.max()) + 1
    if not classes <= count <= len(index):
        raise InputError(
            f"{setting} = {count}: must be at least {classes}, one of each class, and at most "
            f"{len(index)}, the training images without the validation images"
        )
    order = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))]
    place = torch.empty_like(order)  # among the images of the same class
    for label in range(classes):
        same = labels[order] == label
        place[same] = torch.arange(int(same.sum()))
    return order[place.argsort(stable=True)[:count]].sort().values
