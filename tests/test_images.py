"""Single images: upright, in eight bits, and named when they cannot be read."""

import io
import random
import struct
import zlib

import pytest
from helpers import refusal, save_image
from PIL import Image, ImageCms

from transfer.sources.images import read_image


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(path, depth: int, colour_type: int, value: int) -> None:
    """A PNG of 4 x 4 pixels, all channels `value`; Pillow cannot write all of them itself."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    row = b"\0" + value.to_bytes(depth // 8, "big") * (4 * channels)

    header = struct.pack(">IIBBBBB", 4, 4, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
def test_a_png_of_16_bits_is_refused_whatever_its_channels(tmp_path, colour_type):
    png(tmp_path / "deep.png", 16, colour_type, 4000)
    assert "deep.png: has more than 8 bits" in refusal(lambda: read_image(tmp_path / "deep.png", 4))
    png(tmp_path / "usual.png", 8, colour_type, 255)
    assert (read_image(tmp_path / "usual.png", 4) == 255).all()


def test_other_deep_formats_are_refused_too(tmp_path):
    Image.new("I;16", (9, 9), 300).save(tmp_path / "deep.tiff")
    Image.new("F", (9, 9), 0.5).save(tmp_path / "float.tiff")
    Image.new("I;16", (9, 9), 300).save(tmp_path / "deep.jp2")
    (tmp_path / "deep.ppm").write_bytes(b"P6 2 2 4095\n" + b"\x0f\xff" * 12)
    (tmp_path / "deep.pgm").write_bytes(b"P5 2 2 65535\n" + b"\x0f\xff" * 4)
    for name in ("deep.tiff", "float.tiff", "deep.jp2", "deep.ppm", "deep.pgm"):
        message = refusal(lambda name=name: read_image(tmp_path / name, 9))
        assert f"{name}: has more than 8 bits" in message


def test_floating_point_is_refused_and_five_bits_are_not(tmp_path):
    (tmp_path / "deep.pfm").write_bytes(b"Pf\n2 2\n-1.0\n" + struct.pack("<4f", 0, 0.2, 0.5, 1))
    assert "has more than 8 bits" in refusal(lambda: read_image(tmp_path / "deep.pfm", 2))
    masks = struct.pack("<3I", 0xF800, 0x07E0, 0x001F)  # a bitmap of 16 bits a pixel, all red
    header = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0) + masks
    pixels = struct.pack("<4H", *[0xF800] * 4)
    start = struct.pack("<2sIHHI", b"BM", 14 + len(header) + 8, 0, 0, 14 + len(header))
    (tmp_path / "small.bmp").write_bytes(start + header + pixels)
    assert (read_image(tmp_path / "small.bmp", 2) == (255, 0, 0)).all()


@pytest.mark.parametrize("name", ["a.ppm", "a.tiff", "a.jp2", "a.webp", "a.bmp", "a.avif", "a.tga"])
def test_usual_formats_are_read(tmp_path, name):
    save_image(tmp_path / name)
    assert (abs(read_image(tmp_path / name, 8).astype(int) - (255, 0, 0)) < 9).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_usual_colour_modes_are_read(tmp_path, mode):
    if mode == "LAB":
        rgb = ImageCms.createProfile("sRGB")
        to_lab = ImageCms.buildTransform(rgb, ImageCms.createProfile("LAB"), "RGB", "LAB")
        ImageCms.applyTransform(Image.new("RGB", (9, 9)), to_lab).save(tmp_path / "image.tiff")
    else:
        Image.new("RGB", (9, 9)).convert(mode).save(tmp_path / "image.tiff")
    assert read_image(tmp_path / "image.tiff", 8).shape == (8, 8, 3)


@pytest.mark.parametrize("value", range(1, 9))
def test_an_image_is_turned_upright(tmp_path, value):
    exif = Image.Exif()
    exif[0x0112] = value
    image = Image.new("RGB", (8, 8), "white")
    image.paste("red", (0, 0, 4, 4))
    image.save(tmp_path / "turned.png", exif=exif)
    got = read_image(tmp_path / "turned.png", 8)
    corners = [(0, 0), (0, 1), (1, 1), (1, 0)] * 2  # where the red one must be, for 1, 2, ... 8
    row, column = corners[value - 1]
    assert (got[4 * row + 1, 4 * column + 1] == (255, 0, 0)).all()
    assert (got == (255, 0, 0)).all(-1).sum() == 16


def test_transparent_parts_are_white(tmp_path):
    save_image(tmp_path / "clear.png", size=(40, 40), mode="RGBA", colour="#f000")
    assert (read_image(tmp_path / "clear.png", 40) == 255).all()


@pytest.mark.parametrize("extension", ["jpg", "webp"])
def test_an_image_with_broken_metadata_is_used(tmp_path, extension):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010E] = 6, (72, 1), "text"
    exif[0x8769] = {0x829A: (1, 100), 0x9286: b"x"}
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, extension.replace("jpg", "jpeg"), exif=exif)
    good = file.getvalue()
    start, length = good.rindex(b"MM\0*"), len(exif.tobytes()) - 6
    draw = random.Random(0)
    path = tmp_path / f"broken.{extension}"
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(3):
            bad[start + draw.randrange(length)] = draw.choice([0, 255, draw.randrange(256)])
        path.write_bytes(bad)
        assert (read_image(path, 4).astype(int)[..., 0] > 200).all()


def test_damage_anywhere_names_the_file_or_does_not_matter(tmp_path):
    for extension in ("png", "jpeg", "tiff", "gif", "webp", "bmp"):
        file = io.BytesIO()
        Image.effect_noise((16, 16), 90).convert("RGB").save(file, extension)
        draw = random.Random(0)
        path = tmp_path / f"bad.{extension}"
        for _ in range(150):
            bad = bytearray(file.getvalue())
            for _ in range(3):
                bad[draw.randrange(len(bad))] = draw.randrange(256)
            path.write_bytes(bad[: draw.choice([len(bad), draw.randrange(len(bad))])])
            message = refusal(lambda path=path: read_image(path, 4))
            assert message is None or str(path) in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"not an image", "empty, damaged or not an image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"%PDF-1.7\n", "PDF"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x">', "SVG"),
        (b"<!DOCTYPE html>\n<html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"PK\3\4\24\0", "zip archive"),
    ],
)
def test_what_is_not_an_image_is_called_what_it_is(tmp_path, content, words):
    (tmp_path / "image.jpg").write_bytes(content)
    message = refusal(lambda: read_image(tmp_path / "image.jpg", 8))
    assert message.startswith(f"{tmp_path / 'image.jpg'}: is ")
    assert words in message


def test_a_large_image_is_called_too_large(tmp_path):
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert "large.png: is too large" in refusal(lambda: read_image(tmp_path / "large.png", 8))
