"""One's own images: a folder for each class, with or without folders for the splits."""

import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from transfer.common.arrays import Split
from transfer.common.errors import InputError, printable
from transfer.common.machine import free_memory
from transfer.sources.images import read_image
from transfer.splits import stratified

# Hidden files, and what systems and file managers leave behind, are not images.
LITTER = {"thumbs.db", "desktop.ini", "@eadir", "__macosx", "$recycle.bin", "lost+found"}
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
    _check_memory(sum(len(f) for files in found.values() for f in files.values()), size, folder)
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


def find_images(root: Path, skipped: list[str]) -> dict[str, list[Path]]:
    """The files below each class's folder in `root`, sorted; hidden ones and litter to `skipped`.

    Files that lie in `root` itself belong to no class: a line names them.
    """
    found: dict[str, list[Path]] = {}
    loose = []
    for entry in sorted(root.iterdir()):
        if _is_litter(entry.name):
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
                kept = [inner for inner in sorted(folders) if not _is_litter(inner)]
                skipped += [os.path.join(folder, i) for i in folders if i not in kept]
                folders[:] = kept
                for file in sorted(files):
                    path = Path(folder, file)
                    skipped.append(str(path)) if _is_litter(file) else found[name].append(path)
    if loose:
        more = f" and {len(loose) - SHOWN} more" if len(loose) > SHOWN else ""
        names = printable(", ".join(loose[:SHOWN]))
        print(f"{root}: ignored, in no class's folder: {names}{more}", file=sys.stderr, flush=True)
    if empty := [name for name, files in found.items() if not files]:
        raise InputError(f"{root}: there is no image of {', '.join(empty)}; add some or remove it")
    return found


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def _check_memory(count: int, size: int, folder: Path) -> None:
    needed, free = 2 * count * size * size * 3, free_memory()  # the arrays, and a split of them
    if needed > free:
        raise InputError(
            f"{folder}: {count} images of {size} x {size} pixels need {needed / 2**30:.1f} GiB, "
            f"but only {free / 2**30:.1f} are free; take fewer, or a smaller model.image_size"
        )


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
