"""What `data.source` may name: CIFAR-10, and folders of your own images."""

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, refusal, save_image, write_cifar10
from torchvision.datasets import CIFAR10

from tools import demo
from transfer.common.dataset import Split, load_classes, load_split, select_classes, write_dataset
from transfer.sources.cifar10 import read_cifar10
from transfer.sources.folders import read_folders

COMPOSED, DECOMPOSED = "caf\u00e9,\u00a0bar", "cafe\u0301,\u00a0bar"


def make_official(folder: Path, monkeypatch) -> Path:
    """Generated files in ASSETS_DIR, taken for CIFAR-10's official ones; the list of their sums."""
    monkeypatch.setenv("ASSETS_DIR", str(folder))
    inside = write_cifar10(folder)
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in inside.iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list", [("data_batch_1", md5["data_batch_1"])])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", md5["test_batch"])])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    text = "".join(f"{digest}  {name}\n" for name, digest in md5.items())
    (folder / "official.md5").write_text(text)
    return folder / "official.md5"


def test_what_is_written_is_what_the_batches_of_cifar10_hold(tmp_path, monkeypatch):
    splits, classes = read_cifar10(make_official(tmp_path, monkeypatch))
    write_dataset(tmp_path / "out", splits, classes)
    assert load_classes(tmp_path / "out") == demo.CLASSES
    for seed, (name, count) in enumerate({"train": 100, "test": 40}.items()):
        pixels, labels = demo.stripes(count, seed)
        split = load_split(tmp_path / "out", name, classes)
        assert (split.images.numpy() == pixels).all()
        assert split.labels.tolist() == labels


def test_a_bad_list_of_checksums_is_refused(tmp_path, monkeypatch):
    listing = make_official(tmp_path, monkeypatch)
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", 32 * "0")])
    assert "does not list CIFAR-10's official files" in refusal(lambda: read_cifar10(listing))
    listing.write_text("nonsense\n")
    assert f"{listing}: must be what md5sum prints" in refusal(lambda: read_cifar10(listing))


def test_the_official_checksums_are_torchvisions():
    listed = (ROOT / "cifar10.md5").read_text().split()
    official = dict([*CIFAR10.train_list, *CIFAR10.test_list])
    official[CIFAR10.meta["filename"]] = CIFAR10.meta["md5"]
    assert dict(zip(listed[1::2], listed[::2], strict=True)) == official


@pytest.fixture
def album(tmp_path) -> Path:
    """Images of two classes, split, of many sizes, with what systems leave behind."""
    album = tmp_path / "album"
    for split, second in (("train", DECOMPOSED), ("test", COMPOSED)):
        for name, colour in (("apple", "red"), (second, "blue")):
            for number, size in enumerate(((60, 40), (40, 60), (7, 5), (300, 200))):
                save_image(album / split / name / f"{number}.png", size=size, colour=colour)
    for name in (
        "Thumbs.db", "apple/desktop.ini", "apple/.DS_Store", "apple/._0.png", ".git/config",
        "apple/.ipynb_checkpoints/0.png", "apple/deep/@eaDir/1.png", "__MACOSX/1.png", "loose.png",
    ):  # fmt: skip
        (album / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (album / "train" / name).touch()
    return album


def read(source: Path, test_share: float = 0.5) -> tuple[dict[str, Split], list[str]]:
    return read_folders(source, 32, test_share, seed=0)


def test_images_become_equal_squares_and_what_is_no_image_of_a_class_is_said(album, capfd):
    splits, classes = read(album)
    assert classes == ["apple", COMPOSED]
    for split in splits.values():
        assert split.images.shape == (8, 32, 32, 3)
        assert split.images.float().mean((1, 2)).tolist() == [[255, 0, 0]] * 4 + [[0, 0, 255]] * 4
        assert split.labels.tolist() == [0] * 4 + [1] * 4
    words = "(?s)in no class's folder: loose.png\n.* 2 classes: .* skipped 8 hidden or system"
    assert re.search(words, capfd.readouterr().out)


@pytest.mark.parametrize("inside", ["", "train"])
def test_without_a_test_split_a_stratified_one_is_drawn(album, inside):
    shutil.rmtree(album / "test")
    splits, _ = read(album / inside)
    for split in splits.values():
        assert split.labels.tolist() == [0, 0, 1, 1]
    drawn = read(album / inside, test_share=0.01)[0]["test"]
    assert drawn.labels.tolist() == [0, 1]


def test_bad_images_are_named(album):
    for number in range(12):
        (album / f"test/apple/empty_{number}.png").touch()
    os.truncate(album / "train/apple/3.png", 100)
    message = refusal(lambda: read(album))
    assert f"{album / 'train/apple/3.png'}: is damaged" in message
    assert f"{album / 'test/apple/empty_0.png'}: is empty" in message
    assert message.endswith("and 3 more")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: shutil.rmtree(a / "test/apple"), "same classes; only one of them has apple"),
        (lambda a: (a / "train/void").mkdir(), "train: there is no image of void"),
        (lambda a: [shutil.rmtree(a / s / "apple") for s in ("train", "test")], "two or more"),
        (lambda a: a.rename("moved"), "data.source = .*album: does not exist; take .*CLASS/IMAGE"),
        (lambda a: a.rename("moved") and a.mkdir(), "album: holds no folders; take"),
        (lambda a: a.rename("moved") and a.touch(), "album: is a file; take"),
        (lambda a: (a / "train" / COMPOSED).mkdir(), "has the name of another class"),
        (lambda a: (a / "train/two\nlines").mkdir(), r"two\\nlines: cannot be a class; rename"),
        (lambda a: (a / "train" / os.fsdecode(b"\xff")).mkdir(), "cannot be a class; rename"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse some of the names")
def test_what_the_layout_lacks_is_said(album, monkeypatch, change, words):
    monkeypatch.chdir(album.parent)
    change(album)
    assert re.search(words, refusal(lambda: read(album)))


def test_only_the_wanted_classes_remain_numbered_as_wanted(stripes):
    some = select_classes(stripes, demo.CLASSES, ["dog", "cat"])
    assert len(some.labels) == 68
    for label, name in enumerate(("dog", "cat")):
        wanted = stripes.images[stripes.labels == demo.CLASSES.index(name)]
        assert torch.equal(some.images[some.labels == label], wanted)
    words = "data.classes: no class 'lynx'; there are airplane, automobile"
    assert words in refusal(lambda: select_classes(stripes, demo.CLASSES, ["lynx"]))


def test_labels_that_do_not_fit_are_named(stripes, tmp_path):
    write_dataset(tmp_path / "out", {"test": stripes}, demo.CLASSES)
    for labels in (np.full(340, 10), np.arange(10), np.zeros(340, int)):
        np.save(tmp_path / "out/test_labels.npy", labels)
        message = refusal(lambda: load_split(tmp_path / "out", "test", demo.CLASSES))
        assert re.search("labels.npy: (does not fit|there is no image of automobile)", message)
