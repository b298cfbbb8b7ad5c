"""Your own images: a folder for each class, with or without folders for the splits."""

import unicodedata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from transfer.common.dataset import Split, stratified
from transfer.common.errors import InputError, printable
from transfer.common.files import require_hashed
from transfer.sources.images import read_image

# The names of folders of splits, in any case. Of several for a test split the first is taken.
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev")
# What systems and file managers leave behind. Hidden files do not count either.
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "@eadir", "__macosx", "$recycle.bin", "lost+found"}
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
SHOWN = 10  # names in one message


def read_folders(
    folder: Path, size: int, test_share: float, seed: int
) -> tuple[dict[str, Split], list[str]]:
    """Read `folder`/train/CLASS/IMAGE and test/ or a folder of another name in TRAIN and TEST, or
    CLASS/IMAGE without splits.

    Where there is no test split, a stratified `test_share` of the images, drawn with `seed`,
    becomes it. All images become `size` pixels a side. Returns {"train": Split, "test": Split} and
    the class names in composed Unicode (NFC), sorted. Raises InputError, which names up to ten
    files that are damaged or not images, or says what the layout lacks.
    """
    skipped: list[str] = []
    found = {name: find_images(path, skipped) for name, path in find_splits(folder).items()}
    paths = [path for files in found.values() for some in files.values() for path in some]
    require_hashed(folder, paths)
    classes = sorted(found["train"])
    if only := sorted(set(classes) ^ set(found.get("test", classes))):
        raise InputError(
            f"{folder}: the splits must hold the same classes; only one of them has "
            f"{printable(', '.join(only))}"
        )
    if len(classes) < 2:
        raise InputError(f"{folder}: must hold folders of two or more classes; found {classes}")
    print(f"{folder}: {len(classes)} classes: {_some(classes)}", flush=True)
    if skipped:
        print(f"{folder}: skipped {len(skipped)} hidden or system files", flush=True)
    bad: list[str] = []
    splits = {name: _read_all(files, classes, size, bad) for name, files in found.items()}
    if bad:
        raise InputError(_some(bad, "; "))
    if "test" not in splits:
        print(f"{folder}: has no test split; data.test_share = {test_share:g} becomes it")
        whole = splits["train"]
        rest, drawn = stratified(whole.labels, test_share, classes, seed, "data.test_share")
        splits = {"train": whole.take(rest), "test": whole.take(drawn.sort().values)}
    return splits, classes


def find_splits(folder: Path) -> dict[str, Path]:
    """The folders of the splits "train" and, where there is one, "test"; without any, `folder`
    itself as "train". What else lies next to them is named in a line, or refused.
    """
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        if folder.is_file() and folder.suffix.lower() in ARCHIVES:
            problem = "is an archive; unpack it"
        raise _no_layout(folder, problem)
    entries = [entry for entry in sorted(folder.iterdir()) if not _is_system_file(entry.name)]
    folders = {entry.name.lower(): entry for entry in entries if entry.is_dir()}
    if not folders:
        raise _no_layout(folder, "holds no folders")
    train, test = ([name for name in names if name in folders] for names in (TRAIN, TEST))
    if not train and not test:
        return {"train": folder}
    taken = {name: folders[found[0]] for name, found in (("train", train), ("test", test)) if found}
    others = [entry for entry in entries if entry not in taken.values()]
    no_test = "test" not in taken and any(e.is_dir() or e.stem.lower() in TEST for e in others)
    if len(train) != 1 or no_test:
        raise _no_layout(folder, f"holds {_some([entry.name for entry in entries])}")
    if others:
        print(f"{folder}: ignored, next to the splits: {_some([e.name for e in others])}")
    if "test" in taken:
        print(f"{folder}: {taken['test'].name} is the test split", flush=True)
    return taken


def _no_layout(folder: Path, problem: str) -> InputError:
    return InputError(
        f"data.source = {folder}: {problem}; take cifar10.md5, a folder CLASS/IMAGE, or a folder "
        f"train/CLASS/IMAGE and test/CLASS/IMAGE; {', '.join(TRAIN + TEST)} are names of splits, "
        "not of classes"
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
            # A link to a folder counts as a file: it is not followed, and refused later.
            inside = (path for path in entry.rglob("*") if path.is_symlink() or not path.is_dir())
            found[name] = []
            for path in sorted(inside):
                hidden = any(_is_system_file(part) for part in path.relative_to(entry).parts)
                skipped.append(str(path)) if hidden else found[name].append(path)
    if loose:
        print(f"{root}: ignored, in no class's folder: {_some(loose)}", flush=True)
    if empty := [name for name, files in found.items() if not files]:
        raise InputError(f"{root}: there is no image of {', '.join(empty)}; add some or remove it")
    return found


def _is_system_file(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def _some(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return printable(separator.join(names[:SHOWN])) + more


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
