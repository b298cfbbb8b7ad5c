"""Image files of any common format as small square arrays."""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from transfer.settings import InputError

Image.init()
# Raster formats, if this Pillow supports them. For EPS and the like, it starts external programs.
PIXELS = {"AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
FORMATS = sorted(Image.OPEN.keys() & PIXELS)
CHUNK = 256  # files that are read ahead
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "@eadir", "__macosx")  # ignored like hidden files


def hidden(path: Path) -> bool:
    """Whether any part of a relative `path` is hidden or a system's own."""
    return any(part.startswith(".") or part.lower() in SYSTEM_FILES for part in path.parts)


def read_image(path: str | Path, size: int) -> np.ndarray:
    """The image at `path` as uint8 (size, size, 3): its central square, upright, in RGB, on white.

    Raises InputError, which names the file, if it is no image, is damaged or too large, or has one
    channel of more than 8 bits.
    """
    try:
        str(path).encode()  # as it will be written into tables
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(path, formats=FORMATS) as image,
        ):
            if image.mode.startswith(("I", "F")):  # Pillow would clip these, not scale them
                raise InputError(f"{path}: has more than 8 bits a channel; convert it to 8 bits")
            image.draft(None, (size, size))  # a JPEG is decoded at 1/2, 1/4 or 1/8 if that suffices
            image.load()
            with suppress(Exception):  # the metadata may be broken, and the pixels good
                ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                pixels = image.convert("RGBA")
                white = Image.new("RGBA", pixels.size, "white")
                opaque = Image.alpha_composite(white, pixels).convert("RGB")
            else:
                opaque = image.convert("RGB")
            square = ImageOps.fit(opaque, (size, size), Image.Resampling.BILINEAR)
    except InputError:
        raise
    except UnicodeEncodeError:
        raise InputError(f"{str(path)!r}: its name is not UTF-8; rename it") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{path}: is empty, damaged or not an image; convert HEIC, SVG or PDF to JPEG or PNG"
        ) from None
    except Exception as error:  # decoders raise whatever they meet, MemoryError too
        raise InputError(f"{path}: cannot be read as an image: {error!r}") from None
    return np.asarray(square)


def read_images(paths: list[Path], size: int) -> Iterator[np.ndarray | InputError]:
    """What `read_image` returns or raises for each of `paths`, in order; all cores read ahead."""

    def read(path: Path) -> np.ndarray | InputError:
        try:
            return read_image(path, size)
        except InputError as error:
            return error

    progress = tqdm(total=len(paths), desc="read images", unit=" images", leave=False, disable=None)
    with progress, ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), CHUNK):
            for result in pool.map(read, paths[start : start + CHUNK]):
                progress.update()
                yield result
