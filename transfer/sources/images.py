"""One image file of any common format as a small square array."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from transfer.common.errors import InputError

# How to turn an image upright, by the value of EXIF's tag Orientation (EXIF 2.3, 4.6.4.A).
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What the first bytes of files that are often taken for images look like.
OTHER_KINDS = {
    rb"....ftyp(hei|hev|mif1|msf1)": "a HEIC image; convert it to JPEG or PNG",
    rb"%PDF": "a PDF document; save its pages as images",
    rb"(?s).*<svg[\s>]": "an SVG drawing; save it as PNG",
    rb"(?i)\s*<(!doctype html|html|head|body)": "a page of HTML, not the image that it may show",
    rb"version https://git-lfs": "a pointer of Git LFS; run git lfs pull",
    rb"PK\x03\x04": "a zip archive; unpack it",
}


def read_image(path: str | Path, size: int) -> np.ndarray:
    """The image at `path` as uint8 (size, size, 3): its central square, upright, in RGB, on white.

    Broken metadata do not matter. Raises InputError, which names the file, when it cannot be
    opened, is damaged or too large, holds more than 8 bits a channel, or is not an image.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if _is_deep(image):
                raise InputError(f"{path}: has more than 8 bits a channel; convert it to 8 bits")
            image.load()
            pixels = image.convert("RGBA")
            orientation = _orientation(image)
            if orientation in UPRIGHT:
                pixels = pixels.transpose(UPRIGHT[orientation])
        on_white = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
        square = ImageOps.fit(on_white.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path}: is {_kind(Path(path))}") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: is too large: {error}; scale it down") from None
    except Exception as error:  # decoders raise whatever they meet
        reason = getattr(error, "strerror", None)  # the system's, when it cannot be read
        raise InputError(f"{path}: {reason or f'is damaged: {error!r}'}") from None
    return np.asarray(square)


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether the file, not only what Pillow makes of it, has more than 8 bits a channel."""
    if image.mode.startswith(("I", "F")):
        return True
    tags: Any = getattr(image, "tag_v2", {})  # of TIFF; 258 is BitsPerSample
    raw: Any = [tile.args for tile in image.tile]  # how the decoders read the file
    match image.format:
        case "JPEG2000":
            return _bits_of_jpeg2000(Path(os.fsdecode(image.filename))) > 8
        case "PPM" if isinstance(raw[0], tuple):  # the last argument is the brightest value
            return raw[0][-1] > 255
    # BGR;16 has 16 bits a pixel: 5 or 6 a channel.
    return bool(re.search(r"(?<!BGR);(10|12|16|32)", str(raw))) or max(tags.get(258, (8,))) > 8


def _bits_of_jpeg2000(path: Path) -> int:
    """The bits of the first channel: Ssiz in the marker segment SIZ (ISO 15444-1, A.5.1)."""
    content = path.read_bytes()
    start = content.find(b"\xff\x4f\xff\x51")
    return (content[start + 42] & 0x7F) + 1 if start >= 0 else 8


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION)
        return value if isinstance(value, int) else 1
    except Exception:  # the metadata are broken, the pixels may be good
        return 1


def _kind(path: Path) -> str:
    """What a file that Pillow cannot identify seems to be."""
    with path.open("rb") as file:
        start = file.read(1024)
    found = (name for pattern, name in OTHER_KINDS.items() if re.match(pattern, start))
    return next(found, "empty, damaged or not an image" if start else "empty")
