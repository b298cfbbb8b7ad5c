"""Single images: upright, in eight bits, and named when they cannot be read."""

import base64
import io
import random
import re

import numpy as np
import pytest
from helpers import refusal, save_image
from PIL import Image

from transfer.images import read_image


def read(path, content: bytes) -> np.ndarray | str:
    """The image in a file with `content`, or the one line of the refusal."""
    path.write_bytes(content)
    message = refusal(lambda: read_image(path, 8))
    assert message is None or message.startswith(f"{path}: ")
    return message or read_image(path, 8).astype(int)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


FORMATS = ("png", "ppm", "tiff", "jpeg2000", "webp", "bmp", "avif", "tga", "gif", "jpeg")
RED, WHITE, GRAY = (Image.new("RGB", (9, 9), name) for name in ("red", "white", "#404040"))
# One grey pixel, RGB with 16 bits a channel, which Pillow cannot write itself.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABEAIAAADA54+dAAAADElEQVR4nGNwYABBAAMHAMGe8jwPAAAAAElFTkSuQmCC"
READ = {
    **{kind: (saved(RED, kind), RED) for kind in FORMATS},
    **{m: (saved(WHITE.convert(m), "tiff"), WHITE) for m in ("1", "L", "LA", "P", "RGBA", "CMYK")},
    "transparent": (saved(Image.new("RGBA", (9, 9), "#f000"), "png"), WHITE),
    "png, 16 bits": (base64.b64decode(PNG), GRAY),
    "ppm, 16 bits": (b"P6 2 2 65535\n" + b"\x40\0" * 12, GRAY),
}
DEEP, OTHER = "has more than 8 bits a channel; convert it to 8 bits", "is empty, damaged or not an "
REFUSED = {
    **{f"grey {kind}, 16 bits": (saved(Image.new("I;16", (9, 9)), kind), DEEP)
       for kind in ("png", "tiff", "jpeg2000")},
    "float": (saved(Image.new("F", (9, 9)), "tiff"), DEEP),
    "pgm, 16 bits": (b"P5 2 2 65535\n" + b"\x40\0" * 4, DEEP),
    "too large": (b"P6 30000 30000 255\n", "cannot be read as an image: .* exceeds limit"),
    "empty": (b"", OTHER),
    "text": (b"not an image", OTHER),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", f"{OTHER}image; convert HEIC, SVG or PDF"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="x">', OTHER),
    "pdf": (b"%PDF-1.7\n", OTHER),
}  # fmt: skip


@pytest.mark.parametrize(("content", "wanted"), READ.values(), ids=READ)
def test_usual_formats_modes_and_depths_are_read(tmp_path, content, wanted):
    assert (abs(read(tmp_path / "a", content) - wanted.getpixel((0, 0))) < 5).all()


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused(tmp_path, content, words):
    assert re.search(rf"a\.jpg: {words}", read(tmp_path / "a.jpg", content))


def test_a_name_that_is_not_utf_8_is_refused():
    assert refusal(lambda: read_image("caf\udce9.png", 8)).startswith(
        r"'caf\udce9.png': its name is"
    )


@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "jpeg", "avif"])
def test_an_image_is_turned_upright_and_its_central_square_taken(tmp_path, kind):
    exif = Image.Exif()
    for value in range(1, 9):
        exif[0x0112] = value
        save_image(tmp_path / f"a.{kind}", 0, 0, 16, 16, size=(32, 48), exif=exif)
        red = read_image(tmp_path / f"a.{kind}", 32)[..., 1] < 128
        row, column = [(0, 0), (0, 1), (1, 1), (1, 0)][(value - 1) % 4]  # the red corner
        assert red[28 * row :, 28 * column :][:4, :4].all(), value
        assert 110 < red.sum() < 150, value


@pytest.mark.parametrize("kind", [*FORMATS, "metadata of jpeg", "metadata of webp"])
def test_damage_names_the_file_and_in_metadata_does_not_matter(tmp_path, kind):
    draw, exif, metadata = random.Random(1), Image.Exif(), " " in kind
    exif[0x0112], exif[0x011A], exif[0x8769] = 6, 72, {0x829A: (1, 100), 0x9286: b"x"}
    good = saved(RED, kind.split()[-1], **({"exif": exif} if metadata else {}))
    start, length = (good.rindex(b"MM\0*"), 88) if metadata else (0, len(good))
    for _ in range(10):
        places = draw.sample(range(start, start + length), 3)
        bad = bytes(draw.choice([0, 255, b ^ 8]) if i in places else b for i, b in enumerate(good))
        found = read(tmp_path / "a", bad if metadata else bad[: draw.choice([None, places[0]])])
        assert not metadata or (abs(found - (255, 0, 0)) < 5).all()
