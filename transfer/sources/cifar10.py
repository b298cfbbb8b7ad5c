"""CIFAR-10's python version, from ASSETS_DIR or a download, every file checked."""

from pathlib import Path

import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from transfer.common.dataset import Split
from transfer.common.errors import InputError
from transfer.common.files import replacing
from transfer.fetch import assets_dir, fetch, missing_asset


def read_cifar10(listing: Path) -> tuple[dict[str, Split], list[str]]:
    """CIFAR-10; each of its files must have the MD5 sum that `listing` gives, as md5sum prints it.

    DVC needs that file, so that the stage depends on something. The images are in
    ASSETS_DIR/cifar-10-batches-py, or are downloaded into torch's cache. Returns {"train": Split,
    "test": Split} and the class names. Raises InputError when a file is missing, is not what its
    MD5 says or cannot be had.
    """
    if listing.exists() and not listing.is_file():
        raise InputError(f"{listing}: is not a regular file")
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
        md5 = {name: digest for digest, name in (line.split() for line in lines)}
        if missing := {name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)} - md5.keys():
            raise ValueError(f"it lacks {min(missing)}")
    except (OSError, ValueError) as error:
        raise InputError(f"{listing}: must be what md5sum prints: {error}") from None
    root = assets_dir() or Path(torch.hub.get_dir(), "datasets")
    folder = root / CIFAR10.base_folder
    if not assets_dir() and not all(check_integrity(folder / name, md5[name]) for name in md5):
        download(folder)
    for name, digest in md5.items():
        if not (folder / name).is_file():
            raise missing_asset(
                folder / name, f"CIFAR-10's python version, {CIFAR10.url}, unpacked"
            )
        if not check_integrity(folder / name, digest):
            raise InputError(f"{folder / name}: is damaged or altered: its MD5 is not {digest}")
    try:
        sets = {name: CIFAR10(root, train=name == "train") for name in ("train", "test")}
    except RuntimeError as error:  # torchvision has the sums, too
        raise InputError(f"{listing}: does not list CIFAR-10's official files: {error}") from None
    splits = {
        name: Split(torch.from_numpy(read.data), torch.tensor(read.targets))
        for name, read in sets.items()
    }
    return splits, sets["test"].classes


def download(folder: Path) -> None:
    """Download CIFAR-10's archive and unpack it as `folder`, all or nothing."""
    with replacing(folder) as partial:
        archive = partial.parent / CIFAR10.filename
        fetch(CIFAR10.url, archive, lambda path: check_integrity(path, CIFAR10.tgz_md5))
        extract_archive(archive, partial.parent)
