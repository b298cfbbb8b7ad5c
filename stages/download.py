"""Stage `download`: CIFAR-10 or your own images, checked, as uint8 arrays in data/prepared/."""

import unicodedata
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from transfer.data import Split, save_dataset, stratified
from transfer.images import read_image
from transfer.run import OFFLINE, assets_dir, run_stage
from transfer.settings import InputError, Params, load_params

# The names of folders of splits, in any case. Of several the first is taken.
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation"),
}
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "@eadir", "__macosx")  # ignored like hidden files
MAX_NAMED = 10  # names in one message


def main() -> None:
    params = load_params()
    source, wanted = Path(params.data.source), params.data.classes
    if source.name == "cifar10.md5":
        splits, classes = read_cifar10()
    else:
        splits, classes = read_folder(source, params)
    if wanted:
        wanted = [unicodedata.normalize("NFC", name) for name in wanted]
        splits = {name: select_classes(split, classes, wanted) for name, split in splits.items()}
    save_dataset(splits, wanted or classes)


def read_cifar10() -> tuple[dict[str, Split], list[str]]:
    """CIFAR-10, from ASSETS_DIR, torch's cache or a download, and the names of its classes.

    torchvision checks the MD5 sum of every file. Raises InputError if they cannot be had.
    """
    assets = assets_dir()
    root = assets or Path(torch.hub.get_dir(), "datasets")
    splits, classes = {}, []
    for name in ("train", "test"):
        try:
            found = CIFAR10(root, train=name == "train", download=not assets)
        except (RuntimeError, OSError) as error:
            raise InputError(f"{root / CIFAR10.base_folder}: {error}; {OFFLINE}") from None
        splits[name] = Split(torch.from_numpy(found.data), torch.tensor(found.targets))
        classes = found.classes
    return splits, classes


def read_folder(folder: Path, params: Params) -> tuple[dict[str, Split], list[str]]:
    """Images in `folder`/train/CLASS/ and `folder`/test/CLASS/ (SPLITS has the names), or in
    `folder`/CLASS/; and the names of the classes, in composed Unicode (NFC), sorted.

    Without a test split, a random `data.test_share` of each class becomes it. Raises InputError,
    which names up to ten bad files, or says what the layout lacks.
    """
    roots = find_splits(folder)
    found = {name: find_images(root) for name, root in roots.items()}
    classes = sorted(found["train"])
    if only := sorted(set(classes) ^ set(found.get("test", classes))):
        raise layout_error(folder, f"only one of its splits has {abbreviate(only)}")
    if len(classes) < 2:
        raise layout_error(folder, "has images of fewer than two classes")

    bad: list[str] = []
    size = params.model.image_size
    splits = {name: read_images(files, classes, size, bad) for name, files in found.items()}
    if bad:
        raise InputError(abbreviate(bad, "; "))
    if "test" not in splits:
        whole, share = splits["train"], params.data.test_share
        rest, drawn = stratified(whole.labels, share, classes, params.seed, "data.test_share")
        splits = {"train": whole.take(rest), "test": whole.take(drawn.sort().values)}
        print(f"{folder}: has no test split; data.test_share = {share:g} of it becomes one")
    for name, split in splits.items():
        counts = split.labels.bincount(minlength=len(classes)).tolist()
        each = [f"{count} {label}" for label, count in zip(classes, counts, strict=True)]
        print(f"{name}: {roots.get(name, folder)}: {sum(counts)} images: {abbreviate(each)}")
    return splits, classes


def find_splits(folder: Path) -> dict[str, Path]:
    """The folders of the splits; without any, `folder` itself as "train"."""
    if not folder.is_dir():
        raise layout_error(folder, "is no folder")
    beside = {path.name.lower(): path for path in visible(folder)}
    splits = {}
    for split, names in SPLITS.items():
        if named := [beside[name] for name in names if name in beside]:
            splits[split] = named[0]
    if list(splits) == ["test"]:
        raise layout_error(folder, "has no train split")
    if ignored := [p.name for p in beside.values() if splits and p not in splits.values()]:
        print(f"{folder}: ignored {abbreviate(ignored)}")
    return splits or {"train": folder}


def find_images(root: Path) -> dict[str, list[Path]]:
    """The files of each class, in its folder in `root` and below it; a line says what is ignored.

    Raises InputError for a link to a folder: DVC does not hash what it leads to.
    """
    found: dict[str, list[Path]] = {}
    ignored = []
    for top in visible(root):
        inside = [top, *sorted(top.rglob("*"))]
        if links := [path for path in inside if path.is_symlink() and path.is_dir()]:
            raise InputError(f"{links[0]}: is a link to a folder; replace it by the folder itself")
        files = [path for path in inside if path.is_file() and not hidden(path.relative_to(root))]
        if top.is_dir() and files:
            found.setdefault(unicodedata.normalize("NFC", top.name), []).extend(files)
        else:
            ignored.append(top.name)
    if ignored:
        print(f"{root}: ignored {abbreviate(ignored)}: no folder with images", flush=True)
    return found


def hidden(path: Path) -> bool:
    return any(part.startswith(".") or part.lower() in SYSTEM_FILES for part in path.parts)


def visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not hidden(Path(path.name))]


def read_images(
    files: dict[str, list[Path]], classes: list[str], size: int, bad: list[str]
) -> Split:
    """The `files` of each class, `size` pixels a side; what is wrong with a file goes to `bad`."""
    paths = [(path, label) for label, name in enumerate(classes) for path in files[name]]
    images = np.empty((len(paths), size, size, 3), np.uint8)
    for i, (path, _) in enumerate(tqdm(paths, "read images", leave=False, disable=None)):
        try:
            images[i] = read_image(path, size)
        except InputError as error:
            bad.append(str(error))
    return Split(torch.from_numpy(images), torch.tensor([label for _, label in paths]))


def select_classes(split: Split, classes: list[str], wanted: list[str]) -> Split:
    """Only the images of the `wanted` classes, which become classes 0, 1, ..."""
    if unknown := [name for name in wanted if name not in classes]:
        raise InputError(f"data.classes: no class {unknown[0]}; there are {', '.join(classes)}")
    number = torch.full((len(classes),), -1)
    number[[classes.index(name) for name in wanted]] = torch.arange(len(wanted))
    labels = number[split.labels]
    return Split(split.images[labels >= 0], labels[labels >= 0])


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
