import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, contents
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import Compose, Normalize, Resize, ToPILImage, ToTensor

from stages import download
from tools import synthetic
from transfer import data
from transfer.errors import InputError


def test_what_is_written_is_what_the_batches_hold(batches, tmp_path):
    splits, classes = data.read_cifar10(str(batches))
    data.write_arrays(tmp_path / "out", splits, classes)
    pictures, labels = synthetic.pictures(100, seed=1)
    read = data.load_split(tmp_path / "out", "train", classes)
    channel_major = pictures.reshape(-1, 3, 32, 32)
    assert (read.images.numpy() == channel_major.transpose(0, 2, 3, 1)).all()
    assert read.labels.tolist() == labels
    assert len(data.load_split(tmp_path / "out", "test", classes).labels) == 40
    assert data.load_classes(tmp_path / "out") == synthetic.CLASSES


def test_only_the_wanted_classes_remain_numbered_as_wanted(batches):
    splits, classes = data.read_cifar10(str(batches))
    some = data.select_classes(splits["train"], classes, ["dog", "cat"])
    dog, cat = classes.index("dog"), classes.index("cat")
    assert len(some.labels) == 20
    assert (
        some.images[some.labels == 0] == splits["train"].images[splits["train"].labels == dog]
    ).all()
    assert (
        some.images[some.labels == 1] == splits["train"].images[splits["train"].labels == cat]
    ).all()
    with pytest.raises(InputError, match=r"'lynx'.*airplane"):
        data.select_classes(splits["train"], classes, ["cat", "lynx"])


def alter(path, how):
    content = path.read_bytes()
    {
        "missing": lambda: path.unlink(),
        "empty": lambda: path.write_bytes(b""),
        "truncated": lambda: path.write_bytes(content[:-1]),
        "altered": lambda: path.write_bytes(content[:-9] + b"?" + content[-8:]),
    }[how]()


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "altered"])
@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_bad_data_is_refused_and_what_was_there_stays(project, monkeypatch, name, how):
    before = contents(project / "data")
    alter(project / "stripes" / name, how)
    monkeypatch.chdir(project)
    with pytest.raises(InputError, match=f"stripes/{name}: is (missing|damaged)"):
        download.main()
    assert contents(project / "data") == before


@pytest.mark.parametrize("text", ["", "nonsense\n", "0123  data_batch_1\n"])
def test_a_bad_list_of_checksums_is_refused(batches, text):
    (batches / "MD5SUMS").write_text(text)
    with pytest.raises(InputError, match="MD5SUMS: must list"):
        data.read_cifar10(str(batches))


def test_the_official_checksums_are_torchvisions():
    listed = (ROOT / "cifar10/MD5SUMS").read_text().split()
    official = [*CIFAR10.train_list, *CIFAR10.test_list]
    official.append([CIFAR10.meta["filename"], CIFAR10.meta["md5"]])
    assert dict(zip(listed[1::2], listed[::2], strict=True)) == dict(official)


def test_assets_are_held_to_the_official_checksums(project, tmp_path, monkeypatch):
    batches = tmp_path / "cifar-10-batches-py"
    synthetic.write(batches, 20, 20)
    text = (project / "params.yaml").read_text().replace("source: stripes", "source: cifar10")
    (project / "params.yaml").write_text(text)
    monkeypatch.chdir(project)
    monkeypatch.setenv("ASSETS_DIR", str(tmp_path))
    before = contents(project / "data")
    for how in ("damaged", "missing"):
        with pytest.raises(InputError, match=f"{batches / 'data_batch_1'}: is {how}"):
            download.main()
        (batches / "data_batch_1").unlink(missing_ok=True)
    assert contents(project / "data") == before


def test_augmentation_is_a_mirrored_shift_and_a_flip():
    images = torch.randint(0, 256, (500, 32, 32, 3), dtype=torch.uint8)
    index = torch.randperm(500)
    got = data.augment(images, index, 4, torch.Generator().manual_seed(0)).numpy()
    flips, shifts = 0, set()
    for picture, original in zip(got, images[index].numpy(), strict=True):
        padded = np.pad(original, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        found = [
            (dy, dx, flip)
            for dy in range(9)
            for dx in range(9)
            for flip in (False, True)
            if (padded[dy : dy + 32, dx : dx + 32][:, :: -1 if flip else 1] == picture).all()
        ]
        assert len(found) == 1
        shifts.add(found[0][:2])
        flips += found[0][2]
    assert 200 < flips < 300
    assert len(shifts) == 81


def test_no_shift_leaves_pictures_whole():
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    got = data.augment(images, torch.arange(8), 0, torch.Generator().manual_seed(0))
    for picture, original in zip(got, images, strict=True):
        assert (picture == original).all() or (picture == original.flip(1)).all()


@pytest.mark.parametrize("size", [16, 32, 96])
def test_the_input_is_what_torchvision_makes_of_a_picture(size):
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    as_notebooks_do = Compose(
        [
            ToPILImage(),
            Resize((size, size)),
            ToTensor(),
            Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    reference = torch.stack([as_notebooks_do(image.numpy()) for image in images])
    got = data.to_input(images, size)
    assert got.is_contiguous(memory_format=torch.channels_last)
    one_level = 1 / 255 / 0.224  # PIL may round the other way
    torch.testing.assert_close(got, reference, atol=1.01 * one_level, rtol=0)
    assert (got - reference).abs().mean() < 0.1 * one_level


def test_held_out_images_are_not_trained_on(batches):
    train = data.read_cifar10(str(batches))[0]["train"]
    rest, held = data.hold_out(train, 30, seed=3)
    rows = [{r.tobytes() for r in s.images.numpy()} for s in (rest, held)]
    assert [len(r) for r in rows] == [70, 30]
    assert not rows[0] & rows[1]
    assert (data.hold_out(train, 30, seed=3)[1].images == held.images).all()
    assert (data.hold_out(train, 30, seed=4)[1].images != held.images).any()
    with pytest.raises(InputError, match=r"data\.validation = 100"):
        data.hold_out(train, 100, seed=0)


def test_an_epoch_sees_each_picture_once():
    draws = torch.Generator().manual_seed(0)
    batches = data.shuffled_batches(103, 10, draws)
    assert [len(b) for b in batches] == [10] * 10
    assert len(set(torch.cat(batches).tolist())) == 100


def save_picture(path, *box, size=(60, 40), mode="RGB", colour="red", **options):
    """A white picture with a `colour` rectangle at `box`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new(mode, size, "white")
    picture.paste(Image.new(mode, (box[2] - box[0], box[3] - box[1]), colour), box[:2])
    picture.save(path, **options)


@pytest.fixture
def album(tmp_path):
    """Pictures of two classes in ImageFolder's layout, of many sizes and kinds."""
    root = tmp_path / "album"
    for split in ("train", "test"):
        for name, colour in (("apple", "red"), ("sky", "blue")):
            folder = root / split / name
            for number, size in enumerate(((60, 40), (40, 60), (7, 5), (300, 200))):
                save_picture(folder / f"{number}.png", 0, 0, *size, size=size, colour=colour)
            save_picture(folder / "gray.jpg", 0, 0, 9, 9, mode="L", colour=128)
            save_picture(folder / "palette.gif", 0, 0, 9, 9, mode="P", colour=3)
    return root


def test_pictures_of_all_kinds_become_equal_squares(album):
    splits, classes = data.read_source(str(album), 32)
    assert classes == ["apple", "sky"]
    for split in splits.values():
        assert split.images.shape == (12, 32, 32, 3)
        assert split.images.dtype == torch.uint8
        assert split.labels.tolist() == [0] * 6 + [1] * 6
    assert splits["train"].images[0].float().mean((0, 1)).tolist() == [255, 0, 0]
    assert splits["test"].images[6].float().mean((0, 1)).tolist() == [0, 0, 255]


def test_a_picture_is_upright_and_its_transparent_parts_are_white(tmp_path):
    left_half = (0, 0, 20, 40)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held so that the picture must be turned right by 90 degrees
    save_picture(tmp_path / "turned.png", *left_half, size=(40, 40), exif=turned)
    got = data.read_picture(tmp_path / "turned.png", 40)
    assert (got[:20] == (255, 0, 0)).all()
    assert (got[20:] == 255).all()
    save_picture(tmp_path / "clear.png", *left_half, size=(40, 40), mode="RGBA", colour="#f000")
    assert (data.read_picture(tmp_path / "clear.png", 40) == 255).all()


def test_bad_pictures_are_named(album):
    for number in range(12):
        (album / f"test/sky/empty_{number}.png").touch()
    content = (album / "train/apple/3.png").read_bytes()
    (album / "train/apple/3.png").write_bytes(content[: len(content) // 2])
    (album / "train/apple/list.txt").write_text("no picture")
    (album / "train/apple/.hidden").write_text("of no account")
    with pytest.raises(InputError) as refused:
        data.read_source(str(album), 32)
    message = str(refused.value)
    assert "\n" not in message
    assert ".hidden" not in message
    for name in ("train/apple/3.png", "train/apple/list.txt", "test/sky/empty_0.png"):
        assert f"{album / name}: is " in message
    assert message.endswith("and 4 more")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda album: shutil.rmtree(album / "test"), "test: must hold a folder"),
        (lambda album: shutil.rmtree(album / "test/sky"), "train has .* but test has"),
        (lambda album: (album / "train/void").mkdir(), "train: must hold a folder"),
    ],
)
def test_what_the_layout_lacks_is_said(album, change, words):
    change(album)
    with pytest.raises(InputError, match=words):
        data.read_source(str(album), 32)


def test_more_than_8_bits_are_refused_rather_than_cut_off(tmp_path):
    Image.new("I;16", (9, 9), 300).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png: has more than 8 bits"):
        data.read_picture(tmp_path / "deep.png", 9)
