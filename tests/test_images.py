"""Single images: upright, in eight bits, and named when they cannot be read."""

import io
import random
import struct
import zlib

import pytest
from helpers import refusal, save_image
from PIL import Image

from transfer.sources.images import read_image


def read(path, content: bytes):
    """The image in a file with `content`, or the one line of the refusal."""
    path.write_bytes(content)
    message = refusal(lambda: read_image(path, 8))
    assert message is None or message.startswith(f"{path}: ")
    return message or read_image(path, 8).astype(int)


def png(colour_type: int, pixel: bytes) -> bytes:
    """A PNG with 16 bits a channel, which Pillow cannot write itself, each pixel the same."""
    header = struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress((b"\0" + pixel * 4) * 4), b"IEND"):
        content += struct.pack(f">I{len(chunk)}sI", len(chunk) - 4, chunk, zlib.crc32(chunk))
    return content


def saved(image: Image.Image, kind: str, **options) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


FORMATS = ("png", "ppm", "tiff", "jpeg2000", "webp", "bmp", "avif", "tga", "gif", "jpeg")
RED, WHITE, GRAY = (Image.new("RGB", (9, 9), name) for name in ("red", "white", "#404040"))
TAGS = {256: 2, 257: 2, 258: 16, 259: 1, 262: 2, 273: 8, 277: 3, 278: 2, 279: 24}
IFD = [number for tag, value in TAGS.items() for number in (tag, 3, 1, value)]
TIFF = struct.pack(f"<2sHI13H{'HHII' * 9}I", b"II", 42, 32, *[0x4000] * 12, 9, *IFD, 0)
PIXELS = {2: b"\x40\0" * 3, 4: b"\x40\0\xff\xff", 6: b"\x40\0" * 3 + b"\xff\xff"}
READ = {
    **{kind: (saved(RED, kind), RED) for kind in FORMATS},
    **{m: (saved(WHITE.convert(m), "tiff"), WHITE) for m in ("1", "L", "LA", "P", "RGBA", "CMYK")},
    "transparent": (saved(Image.new("RGBA", (9, 9), "#f000"), "png"), WHITE),
    **{f"png {kind}": (png(kind, pixel), GRAY) for kind, pixel in PIXELS.items()},
    "ppm, 16 bits": (b"P6 2 2 65535\n" + b"\x40\0" * 12, GRAY),
    "ppm, 12 bits": (b"P6 2 2 4095\n" + b"\x04\0" * 12, GRAY),
    "tiff, 16 bits": (TIFF, GRAY),
}
DEEP = [saved(Image.new("I;16", (9, 9)), kind) for kind in ("png", "tiff", "jpeg2000")]
DEEP += [saved(Image.new("F", (9, 9)), "tiff"), b"P5 2 2 65535\n" + b"\x40\0" * 4]
OTHERS = [
    b"", b"not an image", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"%PDF-1.7\n",
    b'<?xml version="1.0"?>\n<svg xmlns="x">', b"<!DOCTYPE html>\n<html>",
    b"version https://git-lfs.github.com/spec/v1\noid", b"PK\3\4\24\0",
]  # fmt: skip
REFUSED = [
    *((content, "has more than 8 bits a channel; convert it to 8 bits") for content in DEEP),
    (b"P6 30000 30000 255\n", "is too large"),
    *((content, "is empty, damaged or not an image; convert HEIC") for content in OTHERS),
]


@pytest.mark.parametrize(("content", "wanted"), READ.values(), ids=READ)
def test_usual_formats_modes_and_depths_are_read(tmp_path, content, wanted):
    assert (abs(read(tmp_path / "a", content) - wanted.getpixel((0, 0))) < 5).all()


@pytest.mark.parametrize(("content", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_read_is_refused(tmp_path, content, words):
    assert f"a.jpg: {words}" in read(tmp_path / "a.jpg", content)


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
    for _ in range(100):
        places = draw.sample(range(start, start + length), 3)
        bad = bytes(draw.choice([0, 255, b ^ 8]) if i in places else b for i, b in enumerate(good))
        result = read(tmp_path / "a", bad if metadata else bad[: draw.choice([None, places[0]])])
        assert not (metadata and isinstance(result, str))
