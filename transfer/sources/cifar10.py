"""CIFAR-10's python version: from ASSETS_DIR, a download, or a folder of the same format."""

import tarfile
import tempfile
import zlib
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from transfer.common.arrays import Split
from transfer.common.errors import InputError
from transfer.fetch import assets_dir, fetch

Splits = tuple[dict[str, Split], list[str]]


def read_official(listing: Path) -> Splits:
    """CIFAR-10, its files those whose MD5 sums the file `listing` has, as md5sum prints them.

    They are in ASSETS_DIR/cifar-10-batches-py, or are downloaded into torch's cache. Returns
    {"train": Split, "test": Split} and the class names. Raises InputError when a file is missing,
    is not what its MD5 says or cannot be had.
    """
    if assets := assets_dir():
        return read_batches(assets / CIFAR10.base_folder, listing)
    archive = Path(torch.hub.get_dir(), "datasets", CIFAR10.filename)
    fetch(CIFAR10.url, archive, "md5", CIFAR10.tgz_md5)
    with tempfile.TemporaryDirectory(prefix="cifar10-") as folder:
        try:
            with tarfile.open(archive, "r:gz") as tar:
                tar.extractall(folder, filter=_inside)
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise InputError(
                f"{archive}: cannot be unpacked into {folder}: {error}; make room there, or remove "
                "the archive, and try again"
            ) from None
        return read_batches(Path(folder, CIFAR10.base_folder), listing)


def _inside(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """tarfile's filter "data", which alone would make an absolute path relative."""
    if member.name.startswith("/"):
        raise tarfile.AbsolutePathError(member)
    return tarfile.data_filter(member, folder)


def read_batches(folder: Path, listing: Path) -> Splits:
    """The batches in `folder`, each checked against its MD5 in `listing` before it is unpickled."""
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
        md5 = {name: digest for digest, name in (line.split() for line in lines)}
        meta, test = md5["batches.meta"], md5["test_batch"]
        train = sorted(
            item for item in md5.items() if item[0] not in ("batches.meta", "test_batch")
        )
        if not train:
            raise ValueError("no training batch")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{listing}: must list batches.meta, test_batch and the training batches as md5sum "
            f"prints them: {error!r}"
        ) from None
    for name, digest in md5.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: is missing")
        if not check_integrity(str(folder / name), digest):
            raise InputError(f"{folder / name}: is damaged or altered: its MD5 is not {digest}")
    layout = {
        "base_folder": folder.name,
        "train_list": train,
        "test_list": [("test_batch", test)],
        "meta": CIFAR10.meta | {"md5": meta},
    }
    reader = type("Batches", (CIFAR10,), layout)
    sets = {name: reader(folder.parent, train=name == "train") for name in ("train", "test")}
    splits = {
        name: Split(torch.from_numpy(read.data), torch.tensor(read.targets))
        for name, read in sets.items()
    }
    return splits, sets["test"].classes
