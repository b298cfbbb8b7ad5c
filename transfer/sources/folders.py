"""Your own images: a folder for each class, with or without folders for the splits."""

import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from transfer.common.dataset import Split, stratified
from transfer.common.errors import InputError, printable
from transfer.sources.images import read_image

# Hidden files, and what systems and file managers leave behind, are not images.
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "@eadir", "__macosx", "$recycle.bin", "lost+found"}
SHOWN = 10  # files named in one message


def read_folders(
    folder: Path, size: int, test_share: float, seed: int
) -> tuple[dict[str, Split], list[str]]:
    """Read `folder`/train/CLASS/IMAGE and test/ (or val/), or CLASS/IMAGE without splits.

    Where there is no test split, a stratified `test_share` of the images, drawn with `seed`,
    becomes it. All images become `size` pixels a side. Returns {"train": Split, "test": Split} and
    the class names in composed Unicode (NFC), sorted. Raises InputError, which names up to ten
    files that are damaged or not images, or says what the layout lacks.
    """
    _check_layout(folder)
    skipped: list[str] = []
    root = folder / "train" if (folder / "train").is_dir() else folder
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    found = {"train": find_images(root, skipped)}
    if root != folder and test:
        found["test"] = find_images(test, skipped)
        names = {name: set(files) for name, files in found.items()}
        if only := sorted(names["train"] ^ names["test"]):
            raise InputError(
                f"{folder}: train and {test.name} must hold the same classes; only one of them has "
                f"{printable(', '.join(only))}"
            )
    classes = sorted(found["train"])
    if len(classes) < 2:
        raise InputError(f"{root}: must hold folders of two or more classes; found {classes}")
    if skipped:
        print(f"{folder}: skipped {len(skipped)} hidden or system files", flush=True)
    bad: list[str] = []
    splits = {name: _read_all(files, classes, size, bad) for name, files in found.items()}
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise InputError("; ".join(bad[:SHOWN]) + more)
    if "test" not in splits:
        whole = splits["train"]
        rest, drawn = stratified(whole.labels, test_share, classes, seed, "data.test_share")
        splits = {"train": whole.take(rest), "test": whole.take(drawn.sort().values)}
    return splits, classes


def _check_layout(folder: Path) -> None:
    """Raise InputError, which names the layouts that can be read, unless `folder` holds folders."""
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        if folder.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"):
            problem = "is an archive; unpack it"
    elif any(entry.is_dir() for entry in folder.iterdir()):
        return
    else:
        problem = "holds no folders"
    raise InputError(
        f"data.source = {folder}: {problem}; take cifar10.md5, a folder CLASS/IMAGE, or a folder "
        "train/CLASS/IMAGE and test/CLASS/IMAGE"
    )


def find_images(root: Path, skipped: list[str]) -> dict[str, list[Path]]:
    """The files below each class's folder in `root`, sorted; hidden and system files to `skipped`.

    Files that lie in `root` itself belong to no class: a line names them.
    """
    found: dict[str, list[Path]] = {}
    loose = []
    for entry in sorted(root.iterdir()):
        if _is_system_file(entry.name):
            skipped.append(str(entry))
        elif not entry.is_dir():
            loose.append(entry.name)
        else:
            name = unicodedata.normalize("NFC", entry.name)
            if name in found or printable(name) != name:
                problem = "has the name of another class" if name in found else "cannot be a class"
                raise InputError(f"{printable(entry)}: {problem}; rename the folder")
            found[name] = []
            for folder, folders, files in os.walk(entry, followlinks=True):
                kept = [inner for inner in sorted(folders) if not _is_system_file(inner)]
                skipped += [os.path.join(folder, i) for i in folders if i not in kept]
                folders[:] = kept
                for file in sorted(files):
                    path = Path(folder, file)
                    skipped.append(str(path)) if _is_system_file(file) else found[name].append(path)
    if loose:
        more = f" and {len(loose) - SHOWN} more" if len(loose) > SHOWN else ""
        names = printable(", ".join(loose[:SHOWN]))
        print(f"{root}: ignored, in no class's folder: {names}{more}", file=sys.stderr, flush=True)
    if empty := [name for name, files in found.items() if not files]:
        raise InputError(f"{root}: there is no image of {', '.join(empty)}; add some or remove it")
    return found


def _is_system_file(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def _read_all(files: dict[str, list[Path]], classes: list[str], size: int, bad: list[str]) -> Split:
    """All the `files` of each class as a Split; what is wrong with a file is added to `bad`."""
    paths = [(path, label) for label, name in enumerate(classes) for path in files[name]]
    images = np.empty((len(paths), size, size, 3), np.uint8)
    for i, (path, _) in enumerate(tqdm(paths, "read images", leave=False, disable=None)):
        try:
            images[i] = read_image(path, size)
        except InputError as error:
            bad.append(printable(error))
    return Split(torch.from_numpy(images), torch.tensor([label for _, label in paths]))
