"""Stage `download`: CIFAR-10 or your own images, checked, as uint8 arrays in data/prepared/."""

import hashlib
import shutil
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from transfer.data import interleaved, stratified
from transfer.images import hidden, read_images
from transfer.run import OFFLINE, PREPARED, assets_dir, run_stage, write_json
from transfer.settings import InputError, Params, load_params

# The accepted names of split folders, case-insensitive. If several match, the first one is used.
SPLITS = {
    "train": ("train", "training", "training_set"),
    "test": ("test", "testing", "test_set", "val", "valid", "validation"),
}
MAX_NAMED = 10  # names in one message


class Files(NamedTuple):
    """Image files: paths, an array of objects (n,), labels, int64 (n,), and hashes of the files'
    content, int64 (n,).
    """

    paths: np.ndarray
    labels: Tensor
    keys: Tensor

    def take(self, index: Tensor) -> "Files":
        return Files(self.paths[index.numpy()], self.labels[index], self.keys[index])


def main() -> None:
    params = load_params()
    shutil.rmtree(PREPARED, ignore_errors=True)  # as DVC does
    PREPARED.mkdir(parents=True)
    if Path(params.data.source).name == "cifar10.md5":
        prepare_cifar10(params)
    else:
        prepare_folder(Path(params.data.source), params)


def prepare_cifar10(params: Params) -> None:
    """Write CIFAR-10, from ASSETS_DIR, torch's cache or a download. torchvision checks every MD5.

    Raises InputError if it is missing or damaged.
    """
    assets = assets_dir()
    root = assets or Path(torch.hub.get_dir(), "datasets")
    for name in ("train", "test"):
        try:
            found = CIFAR10(root, train=name == "train", download=not assets)
        except (RuntimeError, OSError) as error:
            raise InputError(f"{root / CIFAR10.base_folder}: {error}; {OFFLINE}") from None
        classes = wanted_classes(params, found.classes)
        numbers = [classes.index(c) if c in classes else -1 for c in found.classes]
        labels = np.array(numbers)[found.targets]
        images = found.data[labels >= 0]
        write_split(name, images, images.shape, labels[labels >= 0])
    write_json(PREPARED / "classes.json", classes)
    write_json(PREPARED / "test_names.json", list(range(len(images))))


def prepare_folder(folder: Path, params: Params) -> None:
    """Write the images in `folder`/train/CLASS/ and `folder`/test/CLASS/ (SPLITS has the names), or
    in `folder`/CLASS/. The names of classes become composed Unicode (NFC).

    Without a test split, `data.test_share` of each class becomes the test split: only the content
    of the files decides which images. Raises InputError, which names up to ten bad files or says
    what is wrong with the layout.
    """
    roots = find_splits(folder)
    found = {name: find_images(root) for name, root in roots.items()}
    classes = wanted_classes(params, sorted(found["train"]))
    only = set(found["train"]) ^ set(found.get("test", found["train"]))
    if params.data.classes:
        only &= set(classes)
    if only:
        raise layout_error(folder, f"only one of its splits has {abbreviate(sorted(only))}")
    if len(classes) < 2:
        raise layout_error(folder, "has images of fewer than two classes")

    splits = {}
    for name, files in found.items():
        paths = [path for c in classes for path in files[c]]
        labels = [label for label, c in enumerate(classes) for _ in files[c]]
        with ThreadPoolExecutor() as pool:
            keys = list(pool.map(file_key, paths))
        splits[name] = Files(np.array(paths, object), torch.tensor(labels), torch.tensor(keys))
    if "test" not in splits:
        whole, share = splits["train"], params.data.test_share
        rest, drawn = stratified(
            whole.labels, share, classes, params.seed, "data.test_share", whole.keys
        )
        splits = {"train": whole.take(rest), "test": whole.take(drawn)}
        print(f"{folder}: has no test split; data.test_share = {share:g} of it becomes one")
    report(roots, classes, splits)
    everything = torch.arange(len(splits["test"].labels))
    mixed = interleaved(splits["test"].labels, everything, params.seed)
    splits["test"] = splits["test"].take(mixed)  # the first test batch shall show all classes

    size, bad = params.model.image_size, []
    for name, split in splits.items():
        read = read_images(list(split.paths), size)
        bad += write_split(name, read, (len(split.paths), size, size, 3), split.labels.numpy())
    if bad:
        raise InputError(abbreviate(bad, "; "))
    np.save(PREPARED / "train_keys.npy", splits["train"].keys.numpy())
    write_json(PREPARED / "classes.json", classes)
    names = [path.relative_to(folder).as_posix() for path in splits["test"].paths]
    write_json(PREPARED / "test_names.json", names)


def find_splits(folder: Path) -> dict[str, Path]:
    """The folders of splits that hold class folders; if there are none, `folder` is "train"."""
    if not folder.is_dir():
        raise layout_error(folder, "is no folder")
    folders = [path for path in visible(folder) if path.is_dir()]
    splits: dict[str, Path] = {}
    without = []
    for split, names in SPLITS.items():
        for path in (path for name in names for path in folders if path.name.lower() == name):
            if any(inside.is_dir() for inside in visible(path)):
                splits.setdefault(split, path)
            else:
                without.append(path.name)
    if list(splits) == ["test"]:
        raise layout_error(folder, "has no train split")
    if not splits and len(without) > 1:
        raise layout_error(folder, f"{' and '.join(without)} have no class folders")
    if ignored := [p.name for p in visible(folder) if splits and p not in splits.values()]:
        print(f"{folder}: ignored {abbreviate(ignored)}")
    return splits or {"train": folder}


def visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not hidden(Path(path.name))]


def find_images(root: Path) -> dict[str, list[Path]]:
    """The files of each class, anywhere below its folder in `root`. What is ignored is printed.

    Raises InputError for a link to a folder, because DVC does not hash what is behind it.
    """
    found: dict[str, list[Path]] = {}
    ignored = []
    for path in (root, *sorted(root.rglob("*"))):
        if hidden(inside := path.relative_to(root)):
            continue
        if path.is_symlink() and path.is_dir():
            raise InputError(f"{path}: is a link to a folder; replace it by the folder itself")
        if len(inside.parts) == 1:
            ignored.append(path.name)
        elif path.is_file():
            found.setdefault(unicodedata.normalize("NFC", inside.parts[0]), []).append(path)
    if ignored := [name for name in ignored if unicodedata.normalize("NFC", name) not in found]:
        print(f"{root}: ignored {abbreviate(ignored)}: no folder with images", flush=True)
    return found


def wanted_classes(params: Params, found: list[str]) -> list[str]:
    """The names in `data.classes`, or all that are `found`."""
    wanted = [unicodedata.normalize("NFC", name) for name in params.data.classes or found]
    if unknown := [name for name in wanted if name not in found]:
        raise InputError(f"data.classes: no class {unknown[0]}; there are {', '.join(found)}")
    return wanted


def file_key(path: Path) -> int:
    """A hash of the content of a file: the first 64 bits of its sha256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def report(roots: dict[str, Path], classes: list[str], splits: dict[str, Files]) -> None:
    """Print how many images of each class a split has, and how many are copies of others."""
    for name, split in splits.items():
        counts = split.labels.bincount(minlength=len(classes)).tolist()
        each = [f"{count} {label}" for label, count in zip(classes, counts, strict=True)]
        where = roots.get(name, roots["train"])
        print(f"{name}: {where}: {len(split.paths)} images: {abbreviate(each)}", flush=True)
    both = int(torch.isin(splits["test"].keys, splits["train"].keys).sum())
    labelled = torch.cat([torch.stack([s.keys, s.labels], dim=1) for s in splits.values()])
    several = len(labelled.unique(dim=0)) - len(labelled[:, 0].unique())
    if both or several:
        print(f"copies: {both} test images are also training images, {several} are in two classes")


def write_split(
    name: str, images: Iterable[np.ndarray | InputError], shape: tuple[int, ...], labels: np.ndarray
) -> list[str]:
    """Write `images`, uint8 NHWC of `shape`, and `labels`; return the errors among the images.

    The file is not written through a memory map, where a full disk would kill the process.
    """
    errors = []
    with (PREPARED / f"{name}_images.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for image in images:
            if isinstance(image, InputError):
                errors.append(str(image))
            else:
                file.write(np.ascontiguousarray(image).data)
    np.save(PREPARED / f"{name}_labels.npy", labels)
    return errors


def abbreviate(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return separator.join(names[:MAX_NAMED]) + more


def layout_error(folder: Path, problem: str) -> InputError:
    return InputError(
        f"data.source = {folder}: {problem}; take cifar10.md5, or a folder CLASS/IMAGE, or "
        "train/CLASS/IMAGE and test/CLASS/IMAGE"
    )


if __name__ == "__main__":
    run_stage("download", main)
