"""What `data.source` may name: CIFAR-10, its format, and folders of one's own images."""

import json
import os
import re
import shutil
import sys
import unicodedata

import numpy as np
import pytest
import torch
from helpers import ROOT, contents, refusal, save_image, set_params
from torchvision.datasets import CIFAR10
from transfer.sources.read import read_source, select_classes

from stages import download
from tools import synthetic
from transfer.common.dataset import load_classes, load_split, write_arrays
from transfer.sources import folders
from transfer.sources.cifar10 import read_batches


def read(source, size=32, test_share=0.25):
    return read_source(str(source), size, test_share, seed=0)


class TestCifar10:
    def test_what_is_written_is_what_the_batches_hold(self, batches, tmp_path):
        splits, classes = read(batches)
        write_arrays(tmp_path / "out", splits, classes)
        pixels, labels = synthetic.images(100, seed=1)
        train = load_split(tmp_path / "out", "train", classes)
        channel_major = pixels.reshape(-1, 3, 32, 32)
        assert (train.images.numpy() == channel_major.transpose(0, 2, 3, 1)).all()
        assert train.labels.tolist() == labels
        assert len(load_split(tmp_path / "out", "test", classes).labels) == 40
        assert load_classes(tmp_path / "out") == synthetic.CLASSES

    def test_only_the_wanted_classes_remain_numbered_as_wanted(self, batches):
        splits, classes = read(batches)
        train = splits["train"]
        some = select_classes(train, classes, ["dog", "cat"])
        assert len(some.labels) == 20
        for label, name in enumerate(("dog", "cat")):
            wanted = train.images[train.labels == classes.index(name)]
            assert (some.images[some.labels == label] == wanted).all()
        message = refusal(lambda: select_classes(train, classes, ["cat", "lynx"]))
        assert re.search("'lynx'.*airplane", message)

    @pytest.mark.parametrize("how", ["missing", "empty", "truncated", "altered"])
    @pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
    def test_bad_data_is_refused_and_what_was_there_stays(self, project, monkeypatch, name, how):
        before = contents(project / "data")
        path = project / "stripes" / name
        good = path.read_bytes()
        bad = {"empty": b"", "truncated": good[:-1], "altered": good[:-9] + b"?" + good[-8:]}
        path.unlink() if how == "missing" else path.write_bytes(bad[how])
        monkeypatch.chdir(project)
        assert re.search(f"stripes/{name}: is (missing|damaged)", refusal(download.main))
        assert contents(project / "data") == before

    @pytest.mark.parametrize(
        "text", ["", "nonsense\n", "0123  data_batch_1\n", "01  batches.meta\n23  test_batch\n"]
    )
    def test_a_bad_list_of_checksums_is_refused(self, batches, text):
        (batches / "MD5SUMS").write_text(text)
        assert "MD5SUMS: must list" in refusal(lambda: read(batches))

    def test_the_official_checksums_are_torchvisions(self):
        listed = (ROOT / "cifar10.md5").read_text().split()
        official = [*CIFAR10.train_list, *CIFAR10.test_list]
        official.append([CIFAR10.meta["filename"], CIFAR10.meta["md5"]])
        assert dict(zip(listed[1::2], listed[::2], strict=True)) == dict(official)

    def test_assets_are_held_to_the_official_checksums(self, project, tmp_path, monkeypatch):
        files = tmp_path / "cifar-10-batches-py"
        synthetic.write(files, 20, 20)
        set_params(project, {"data": {"source": "cifar10.md5"}})
        monkeypatch.chdir(project)
        monkeypatch.setenv("ASSETS_DIR", str(tmp_path))
        before = contents(project / "data")
        for how in ("damaged", "missing"):
            assert f"{files / 'batches.meta'}: is {how}" in refusal(download.main)
            (files / "batches.meta").unlink(missing_ok=True)
        assert contents(project / "data") == before


@pytest.fixture
def album(tmp_path):
    """Images of two classes, split, of many sizes and kinds."""
    root = tmp_path / "album"
    for split in ("train", "test"):
        for name, colour in (("apple", "red"), ("sky", "blue")):
            folder = root / split / name
            for number, size in enumerate(((60, 40), (40, 60), (7, 5), (300, 200))):
                save_image(folder / f"{number}.png", size=size, colour=colour)
            save_image(folder / "gray.jpg", 0, 0, 9, 9, mode="L", colour=128)
            save_image(folder / "palette.gif", 0, 0, 9, 9, mode="P", colour=3)
    return root


class TestFolders:
    def test_images_of_all_kinds_become_equal_squares(self, album):
        splits, classes = read(album)
        assert classes == ["apple", "sky"]
        for split in splits.values():
            assert split.images.shape == (12, 32, 32, 3)
            assert split.images.dtype == torch.uint8
            assert split.labels.tolist() == [0] * 6 + [1] * 6
        assert splits["train"].images[0].float().mean((0, 1)).tolist() == [255, 0, 0]
        assert splits["test"].images[6].float().mean((0, 1)).tolist() == [0, 0, 255]

    def test_val_stands_in_for_test(self, album):
        whole = read(album)
        (album / "test").rename(album / "val")
        again = read(album)
        assert torch.equal(again[0]["test"].images, whole[0]["test"].images)

    @pytest.mark.parametrize("layout", ["class folders", "train only"])
    def test_without_a_test_split_a_stratified_one_is_drawn(self, album, layout):
        shutil.rmtree(album / "test")
        source = album / "train" if layout == "class folders" else album
        splits, classes = read(source, test_share=1 / 3)
        assert classes == ["apple", "sky"]
        assert splits["test"].labels.tolist() == [0, 0, 1, 1]
        assert splits["train"].labels.tolist() == [0] * 4 + [1] * 4
        assert "data.test_share = 0.01" in refusal(lambda: read(source, test_share=0.01))

    def test_bad_images_are_named(self, album):
        for number in range(12):
            (album / f"test/sky/empty_{number}.png").touch()
        content = (album / "train/apple/3.png").read_bytes()
        (album / "train/apple/3.png").write_bytes(content[: len(content) // 2])
        (album / "train/apple/list.txt").write_text("no image")
        message = refusal(lambda: read(album))
        for name in ("train/apple/3.png", "train/apple/list.txt", "test/sky/empty_0.png"):
            assert f"{album / name}: is " in message
        assert message.endswith("and 4 more")

    def test_hidden_files_and_litter_never_count_and_the_rest_is_named(self, album, capfd):
        whole = read(album)
        capfd.readouterr()
        (album / "train/apple/.ipynb_checkpoints").mkdir()
        shutil.copy(album / "train/apple/0.png", album / "train/apple/.ipynb_checkpoints/0.png")
        (album / "train/apple/deep/@eaDir").mkdir(parents=True)
        (album / "train/apple/deep/@eaDir/1.png").touch()
        for name in ("Thumbs.db", "sky/desktop.ini", "sky/.DS_Store", "sky/._0.png"):
            (album / "train" / name).touch()
        for name in ("__MACOSX", ".git"):
            (album / "train" / name).mkdir()
        (album / "train/loose.png").touch()
        again = read(album)
        assert again[1] == ["apple", "sky"]
        assert torch.equal(again[0]["train"].images, whole[0]["train"].images)
        out, err = capfd.readouterr()
        assert "skipped 8 hidden or system files" in out
        assert "train: ignored, in no class's folder: loose.png" in err

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda a: shutil.rmtree(a / "test/sky"), "same classes; only one of them has sky"),
            (lambda a: (a / "train/void").mkdir(), "only one of them has void|no image of void"),
            (lambda a: [(a / s / "void").mkdir() for s in ("train", "test")], "no image of void"),
            (lambda a: [shutil.rmtree(a / s / "sky") for s in ("train", "test")], "two or more"),
        ],
    )
    def test_what_the_layout_lacks_is_said(self, album, change, words):
        change(album)
        assert re.search(words, refusal(lambda: read(album)))

    def test_what_is_no_data_set_is_refused_with_the_layouts(self, tmp_path):
        (tmp_path / "images.zip").write_bytes(b"PK\3\4")
        (tmp_path / "flat").mkdir()
        save_image(tmp_path / "flat/1.png")
        (tmp_path / "empty").mkdir()
        for name, words in (
            ("missing", "does not exist"),
            ("images.zip", "is an archive; unpack it"),
            ("flat", "holds no folders"),
            ("empty", "holds no folders"),
            ("flat/1.png", "is a file"),
        ):
            message = refusal(lambda name=name: read(tmp_path / name))
            assert words in message
            assert "train/CLASS/IMAGE" in message
            assert "data.source" in message

    def test_composed_and_decomposed_names_are_the_same_class(self, album):
        composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
        (album / "train/sky").rename(album / "train" / decomposed)
        (album / "test/sky").rename(album / "test" / composed)
        splits, classes = read(album)
        assert classes == ["apple", composed]
        assert select_classes(splits["train"], classes, [composed, "apple"]).labels.sum() == 6
        (album / "train" / composed).mkdir()
        assert "has the name of another class" in refusal(lambda: read(album))

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
    @pytest.mark.parametrize("name", ["two\nlines", "tab\there", b"\xff\xfe"])
    def test_names_that_cannot_be_kept_are_refused_in_one_line(self, album, name):
        for split in ("train", "test"):
            folder = os.fsencode(album / split)
            os.rename(os.path.join(folder, b"sky"), os.path.join(folder, os.fsencode(name)))
        assert "cannot be a class; rename the folder" in refusal(lambda: read(album))

    def test_names_with_unusual_line_ends_and_commas_are_kept(self, album, tmp_path):
        name = 'a, "b"\u00a0c'
        for split in ("train", "test"):
            (album / split / "sky").rename(album / split / name)
        write_arrays(tmp_path / "out", *read(album))
        assert load_classes(tmp_path / "out") == [name, "apple"]
        assert json.loads((tmp_path / "out/classes.json").read_text("utf-8")) == [name, "apple"]

    def test_more_than_fits_into_memory_is_refused_before_any_is_read(self, album, monkeypatch):
        monkeypatch.setattr(folders, "free_memory", lambda: 10**6)
        monkeypatch.setattr(folders, "read_image", lambda *_: pytest.fail("read"))
        assert "24 images of 512 x 512 pixels need 0.0 GiB" in refusal(lambda: read(album, 512))


def test_a_damaged_list_or_array_is_named(batches, tmp_path):
    splits, classes = read_batches(batches, batches / "MD5SUMS")
    folder = tmp_path / "out"
    write_arrays(folder, splits, classes)
    np.save(folder / "test_labels.npy", np.array([0, 10, -1]))
    assert "test_labels.npy" in refusal(lambda: load_split(folder, "test", classes))
    (folder / "classes.json").write_text("{}")
    assert "classes.json" in refusal(lambda: load_classes(folder))
