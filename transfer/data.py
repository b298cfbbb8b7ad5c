"""CIFAR-10 or one's own pictures as arrays in memory; batches, augmented and scaled whole."""

import os
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from transfer.download import fetch
from transfer.errors import InputError
from transfer.files import replacing, sha256

# ImageNet's channel means and standard deviations, which the pretrained weights expect
# (torchvision.transforms._presets.ImageClassification), here on the scale 0 to 255.
MEAN = torch.tensor([0.485, 0.456, 0.406]) * 255
STD = torch.tensor([0.229, 0.224, 0.225]) * 255


class Split(NamedTuple):
    """Pictures and their classes: uint8 NHWC (N, H, W, 3), and int64 (N,)."""

    images: Tensor
    labels: Tensor


def read_cifar10(source: str) -> tuple[dict[str, Split], list[str]]:
    """Read CIFAR-10's python version, each file's MD5 checked before it is unpickled.

    `source` is a folder with a file MD5SUMS, as the command md5sum writes it, and the files that
    it lists. Those of the folder "cifar10", the official ones, are in the folder that the
    environment variable ASSETS_DIR names, or are downloaded into torch's cache. Returns
    {"train": Split, "test": Split} and the class names. Raises InputError when a file is missing,
    is not what its MD5 says or cannot be had.
    """
    listed = _listed_in_md5sums(Path(source))
    if source != "cifar10":
        return _read(Path(source), listed)
    if assets := os.environ.get("ASSETS_DIR"):
        return _read(Path(assets) / CIFAR10.base_folder, listed)
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
        return _read(Path(folder) / CIFAR10.base_folder, listed)


def _inside(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """tarfile's filter "data", which alone would make an absolute path relative."""
    if member.name.startswith("/"):
        raise tarfile.AbsolutePathError(member)
    return tarfile.data_filter(member, folder)


def _listed_in_md5sums(folder: Path) -> dict:
    """The file names and MD5s of `folder`/MD5SUMS, in the form in which torchvision keeps them."""
    try:
        lines = (folder / "MD5SUMS").read_text().splitlines()
        md5 = {name: digest for digest, name in (line.split() for line in lines)}
        meta, test = md5.pop("batches.meta"), md5.pop("test_batch")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder / 'MD5SUMS'}: must list batches.meta, test_batch and the training batches "
            f"as md5sum prints them: {error!r}"
        ) from None
    return {
        "train_list": sorted(md5.items()),
        "test_list": [("test_batch", test)],
        "meta": CIFAR10.meta | {"md5": meta},
    }


def _read(folder: Path, listed: dict) -> tuple[dict[str, Split], list[str]]:
    layout = type("Layout", (CIFAR10,), {"base_folder": folder.name, **listed})
    meta = (layout.meta["filename"], layout.meta["md5"])
    for name, md5 in (*layout.train_list, *layout.test_list, meta):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: is missing")
        if not check_integrity(str(folder / name), md5):
            raise InputError(f"{folder / name}: is damaged or altered: its MD5 is not {md5}")
    sets = {split: layout(folder.parent, train=split == "train") for split in ("train", "test")}
    splits = {
        split: Split(torch.from_numpy(data.data), torch.tensor(data.targets))
        for split, data in sets.items()
    }
    return splits, sets["test"].classes


def read_picture(path: str | Path, size: int) -> np.ndarray:
    """The picture at `path` as uint8 (size, size, 3): its middle, upright, in RGB, on white.

    Raises InputError when it cannot be opened, is damaged or no picture.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{path}: has more than 8 bits a channel; convert it to 8 bits")
            image = ImageOps.exif_transpose(image).convert("RGBA")
    except UnidentifiedImageError:
        raise InputError(f"{path}: is empty, damaged or no picture") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None)  # the system's, which has not let it be read
        raise InputError(f"{path}: {reason or f'is damaged or no picture: {error}'}") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


def read_folder(folder: Path, size: int) -> tuple[dict[str, Split], list[str]]:
    """Read pictures in torchvision's ImageFolder layout: {train,test}/CLASS/PICTURE.

    Returns {"train": Split, "test": Split}, all pictures `size` pixels a side, and the class
    names. Hidden files do not count. Raises InputError, which names up to ten files that are
    damaged or no pictures, or what the layout lacks.
    """
    splits, classes, bad = {}, None, []
    for name in ("train", "test"):
        try:
            found = ImageFolder(
                folder / name, is_valid_file=lambda path: not Path(path).name.startswith(".")
            )
        except FileNotFoundError as error:
            raise InputError(
                f"{folder / name}: must hold a folder of pictures for each class: {error}"
            ) from None
        if classes not in (None, found.classes):
            raise InputError(f"{folder}: train has {classes}, but test has {found.classes}")
        classes, images = found.classes, []
        for path, _ in tqdm(found.samples, str(folder / name), leave=False, disable=None):
            try:
                images.append(read_picture(path, size))
            except InputError as error:
                bad.append(str(error))
        if not bad:
            splits[name] = Split(
                torch.from_numpy(np.stack(images)), torch.tensor(found.targets, dtype=torch.long)
            )
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise InputError("; ".join(bad[:10]) + more)
    return splits, classes


def read_source(source: str, size: int) -> tuple[dict[str, Split], list[str]]:
    """Read what `data.source` names: pictures of one's own, `size` pixels a side, or CIFAR-10."""
    if Path(source, "train").is_dir():
        return read_folder(Path(source), size)
    return read_cifar10(source)


def select_classes(split: Split, names: list[str], wanted: list[str]) -> Split:
    """Only the pictures of the `wanted` classes; labels become indices into `wanted`."""
    if unknown := [name for name in wanted if name not in names]:
        raise InputError(f"data.classes: no class {unknown[0]!r}; there are {', '.join(names)}")
    index = torch.full((len(names),), -1)
    index[[names.index(name) for name in wanted]] = torch.arange(len(wanted))
    labels = index[split.labels]
    return Split(split.images[labels >= 0], labels[labels >= 0])


def write_arrays(folder: Path, splits: dict[str, Split], classes: list[str]) -> None:
    """Write {train,test}_{images,labels}.npy, classes.txt and SHA256SUMS of them into `folder`."""
    with replacing(folder) as new:
        new.mkdir()
        for name, split in splits.items():
            for kind, tensor in split._asdict().items():
                np.save(new / f"{name}_{kind}.npy", tensor.numpy())
        (new / "classes.txt").write_text("\n".join(classes) + "\n")
        lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(new.iterdir())]
        (new / "SHA256SUMS").write_text("".join(lines))


def _checked(path: Path) -> Path:
    """`path`, if it holds what `write_arrays` wrote to it."""
    try:
        listed = (path.parent / "SHA256SUMS").read_bytes().splitlines()
        good = f"{sha256(path)}  {path.name}".encode() in listed
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; run dvc repro download") from None
    if not good:
        raise InputError(
            f"{path}: is damaged or altered: its sha256 is not in SHA256SUMS; "
            "run dvc repro download"
        )
    return path


def load_split(folder: Path, name: str, classes: list[str]) -> Split:
    """Map the "train" or the "test" split that `write_arrays` wrote into memory.

    Raises InputError when a file is missing or damaged, or one of `classes` has no picture.
    """
    split = Split(
        *(
            torch.from_numpy(np.load(_checked(folder / f"{name}_{kind}.npy"), mmap_mode="c"))
            for kind in Split._fields
        )
    )
    require_all(split, classes, f"{folder}/{name}_labels.npy")
    return split


def require_all(split: Split, classes: list[str], where: str) -> None:
    """Raise InputError, which names `where`, unless each of `classes` has a picture in `split`."""
    counts = split.labels.bincount(minlength=len(classes)).tolist()
    if missing := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise InputError(f"{where}: there is no picture of {', '.join(missing)}")


def load_classes(folder: Path) -> list[str]:
    """The class names in the order of the labels."""
    return _checked(folder / "classes.txt").read_text().splitlines()


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Part `split` at random into (all but `count` pictures, `count` pictures)."""
    if count >= len(split.labels):
        raise InputError(
            f"data.validation = {count}: must be below the {len(split.labels)} training images"
        )
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    held, rest = order[:count], order[count:].sort().values
    return tuple(Split(split.images[part], split.labels[part]) for part in (rest, held))


def shuffled_batches(count: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The indices 0..count-1 in random order, in full batches; the rest is left out."""
    order = torch.randperm(count, generator=generator)
    return order[: count - count % batch_size].split(batch_size)


def augment(images: Tensor, index: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    """The pictures at `index`, each shifted by up to `crop` pixels and every second one flipped.

    `images` is uint8 NHWC on any device; `generator` draws on the CPU, so the draws are the same
    on every device. What a shift uncovers is filled by mirroring at the border. One gather does
    it all. Returns a new uint8 NHWC tensor.
    """
    height, width = images.shape[1:3]

    def source(size: int) -> Tensor:
        shift = torch.randint(-crop, crop + 1, (len(index), 1), generator=generator)
        position = (torch.arange(size) + shift).abs()
        return (size - 1) - ((size - 1) - position).abs()

    rows, columns = source(height), source(width)
    flip = torch.rand((len(index), 1), generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    gather = (index[:, None, None], rows[:, :, None], columns[:, None, :])
    return images[tuple(i.to(images.device) for i in gather)]


def to_input(images: Tensor, size: int) -> Tensor:
    """uint8 NHWC -> what a backbone takes: float32 NCHW, `size` pixels a side, channels last.

    Scaled bilinearly (with antialiasing when it shrinks) and rounded to uint8, as PIL does, which
    is several times as fast as in float32; then normalised with ImageNet's statistics.
    """
    pictures = resize(images.permute(0, 3, 1, 2), [size, size])
    mean, std = (t.to(images.device).view(3, 1, 1) for t in (MEAN, STD))
    return torch.addcmul(-mean / std, pictures, 1 / std)  # (pictures - mean) / std, in one pass
