"""The prepared data set on disk: images and labels as plain arrays, and the names of the classes.

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

PREPARED = Path("data/prepared")


class Split(NamedTuple):
    """Images and their labels: uint8 NHWC (N, H, W, 3), and int64 (N,)."""

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> "Split":
        """The images and labels at `index`, in its order."""
        return Split(self.images[index], self.labels[index])


def write_arrays(folder: Path, splits: dict[str, Split], classes: list[str]) -> None:
    """Write the "train" and "test" `splits` and the class names into `folder`, all or nothing."""
    with replacing(folder) as new:
        new.mkdir()
        for name, split in splits.items():
            for kind, tensor in split._asdict().items():
                np.save(new / f"{name}_{kind}.npy", tensor.numpy())
        write_json(new / "classes.json", classes)


def load_split(folder: Path, name: str, classes: list[str]) -> Split:
    """Map the "train" or the "test" split that `write_arrays` wrote into memory.

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
