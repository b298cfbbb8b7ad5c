"""What `data.source` names, whatever its layout."""

from pathlib import Path

import torch

from transfer.common.arrays import Split
from transfer.common.errors import InputError
from transfer.sources.cifar10 import read_batches, read_official
from transfer.sources.folders import read_folders

LAYOUTS = (
    "take cifar10.md5, a folder CLASS/IMAGE, a folder train/CLASS/IMAGE and test/CLASS/IMAGE, "
    "or CIFAR-10's python batches with their MD5SUMS"
)


def read_source(
    source: str, size: int, test_share: float, seed: int
) -> tuple[dict[str, Split], list[str]]:
    """Read the data set at `source`: {"train": Split, "test": Split} and the class names.

    One's own images become `size` pixels a side; where they have no test split, `test_share` and
    `seed` draw one. Raises InputError, which names the layouts that can be read.
    """
    path = Path(source)
    if path.suffix == ".md5" and path.is_file():
        return read_official(path)
    if (path / "MD5SUMS").is_file() or (path / "batches.meta").is_file():
        return read_batches(path, path / "MD5SUMS")
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        if path.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar") and path.exists():
            problem = "is an archive; unpack it"
        raise InputError(f"data.source = {source}: {problem}; {LAYOUTS}")
    if not any(entry.is_dir() for entry in path.iterdir()):
        raise InputError(f"data.source = {source}: holds no folders; {LAYOUTS}")
    return read_folders(path, size, test_share, seed)


def select_classes(split: Split, names: list[str], wanted: list[str]) -> Split:
    """Only the images of the `wanted` classes; labels become indices into `wanted`."""
    if unknown := [name for name in wanted if name not in names]:
        raise InputError(f"data.classes: no class {unknown[0]!r}; there are {', '.join(names)}")
    index = torch.full((len(names),), -1)
    index[[names.index(name) for name in wanted]] = torch.arange(len(wanted))
    labels = index[split.labels]
    return Split(split.images[labels >= 0], labels[labels >= 0])
