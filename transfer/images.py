"""One image file of any common format as a small square array."""

import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from transfer.settings import InputError


def read_image(path: str | Path, size: int) -> np.ndarray:
    """The image at `path` as uint8 (size, size, 3): its central square, upright, in RGB, on white.

    Raises InputError, which names the file, if it is no image, is damaged or too large, or has one
    channel of more than 8 bits.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would clip these, not scale them
                raise InputError(f"{path}: has more than 8 bits a channel; convert it to 8 bits")
            image.load()
            with suppress(Exception):  # the metadata may be broken, and the pixels good
                ImageOps.exif_transpose(image, in_place=True)
            pixels = image.convert("RGBA")
        on_white = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
        square = ImageOps.fit(on_white.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise InputError(
            f"{path}: is empty, damaged or not an image; convert HEIC, SVG or PDF to JPEG or PNG"
        ) from None
    except Exception as error:  # decoders raise whatever they meet
        raise InputError(f"{path}: cannot be read as an image: {error}") from None
    return np.asarray(square)
