"""Stage `download`: CIFAR-10 and folders of your own images become arrays in data/prepared/."""

import hashlib
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT, go_offline, refusal, save_image, set_params
from torchvision.datasets import CIFAR10

from stages.download import main
from tools.demo import striped
from transfer.data import balanced, load_json, load_split, stratified

CACHE = Path("torch/hub/datasets")
COMPOSED, DECOMPOSED = "caf\u00e9,\u00a0bar", "cafe\u0301,\u00a0bar"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with settings for images/, and an empty cache of torch."""
    monkeypatch.chdir(tmp_path)
    go_offline(monkeypatch, tmp_path / "torch")
    CACHE.parent.mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    set_params(tmp_path, {"data.source": "images", "data.test_share": 0.5, "model.image_size": 32})
    return tmp_path


@pytest.fixture
def batches(here, monkeypatch) -> Path:
    """Generated images in CIFAR-10's layout in ASSETS_DIR, taken for the official ones."""
    set_params(here, {"data.source": "cifar10.md5"})
    monkeypatch.setenv("ASSETS_DIR", str(here / "assets"))
    batches, md5 = here / "assets" / CIFAR10.base_folder, {}
    batches.mkdir(parents=True)
    images, labels = striped(100, seed=0)
    rows = images.transpose(0, 3, 1, 2).reshape(100, -1)  # channel by channel
    for name, content in {
        "data_batch_1": {"data": rows[:60], "labels": labels[:60].tolist()},
        "test_batch": {"data": rows[60:], "labels": labels[60:].tolist()},
        "batches.meta": {"label_names": list("abcdefghij")},
    }.items():
        (batches / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((batches / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [("data_batch_1", md5["data_batch_1"])])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", md5["test_batch"])])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    return batches


@pytest.mark.parametrize("place", ["ASSETS_DIR", "torch's cache"])
def test_what_is_written_is_what_the_batches_of_cifar10_hold(batches, monkeypatch, place):
    if place == "torch's cache":
        monkeypatch.setenv("ASSETS_DIR", "")
        batches.parent.rename(CACHE)
    main()
    images, labels = map(torch.from_numpy, striped(100, seed=0))
    for name, index in {"train": slice(60), "test": slice(60, 100)}.items():
        assert torch.equal(load_split(name).images, images[index])
        assert torch.equal(load_split(name).labels, labels[index])
    assert load_json("classes") == list("abcdefghij")


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 90)])
def test_missing_and_damaged_assets_end_in_one_line(batches, name, damage):
    damage(batches / name)
    words = f"{re.escape(str(batches))}: .* corrupted.*ASSETS_DIR.* make demo"
    assert re.match(words, refusal(main))


def test_a_download_that_fails_ends_in_one_line(here):
    set_params(here, {"data.source": "cifar10.md5"})
    assert re.search("cifar-10-batches-py: .+; .*ASSETS_DIR.* make demo", refusal(main))


def fill(*folders: str, classes=("apple", "sky")) -> None:
    """Four images of each class, red and blue ones, in each of `folders` in images/."""
    for folder in folders:
        for name, colour in zip(classes, ("red", "blue"), strict=True):
            for number, size in enumerate(((60, 40), (40, 60), (7, 5), (300, 200))):
                path = Path("images", folder, name, f"{number}.png")
                save_image(path, size=size, colour=colour)


def prepared() -> tuple[list[int], list[int]]:
    """The labels of the splits that the stage has written, those of the test split sorted."""
    return load_split("train").labels.tolist(), sorted(load_split("test").labels.tolist())


def test_images_become_equal_squares_and_what_is_ignored_is_said(capsys):
    fill("train", "test", classes=("apple", COMPOSED))
    save_image(Path("images/train", DECOMPOSED, "within/a/4.png"), colour="blue")
    for name in (
        "Thumbs.db", "apple/desktop.ini", "apple/.DS_Store", "apple/._0.png", ".git/config",
        "apple/.checkpoints/0.png", "apple/deep/@eaDir/1.png", "__MACOSX/1.png", "loose.png",
        "void/deep/.hidden",
    ):  # fmt: skip
        path = Path("images/train", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    main()
    assert load_json("classes") == ["apple", COMPOSED]
    assert prepared() == ([0] * 4 + [1] * 5, [0] * 4 + [1] * 4)
    images = load_split("train").images
    assert images.shape == (9, 32, 32, 3)
    assert images.float().mean((1, 2)).tolist() == [[255, 0, 0]] * 4 + [[0, 0, 255]] * 5
    said = capsys.readouterr().out
    assert re.search("train.*: 9 images: 4 apple, 5 caf.*\ntest.*: 8 images: 4 apple, 4 caf", said)
    assert re.findall("ignored (.*): ", said) == ["loose.png, void"]


@pytest.mark.parametrize(
    ("folders", "sizes", "words"),
    [
        (["Training", "Testing"], (8, 8), "test: .*Testing: 8 images"),
        (["TRAIN", "validation"], (8, 8), "test: .*validation: 8 images"),
        (["training_set", "test_set"], (8, 8), "test: .*test_set: 8 images"),
        (["train", "test", "val"], (8, 8), "images: ignored val"),
        (["train", "holdout"], (4, 4), "images: ignored holdout"),
        (["train", "Train", "test"], (8, 8), "images: ignored [Tt]rain"),
        ([""], (4, 4), "images: has no test split; data.test_share = 0.5"),
        (["trainset", "testset"], (8, 8), "4 testset, 4 trainset"),
    ],
)
def test_splits_are_known_by_name_and_what_else_is_there_said(capsys, folders, sizes, words):
    fill(*folders)
    main()
    assert prepared() == tuple([0] * (size // 2) + [1] * (size // 2) for size in sizes)
    assert re.search(words, capsys.readouterr().out)


def test_up_to_ten_bad_images_are_named():
    fill("train", "test")
    for number in range(12):
        Path(f"images/test/apple/empty_{number}.png").touch()
    os.truncate("images/train/apple/3.png", 100)
    message = refusal(main)
    for name in ("train/apple/3.png", "test/apple/empty_0.png"):
        assert f"{Path('images', name)}: " in message
    assert message.count(".png: ") == 10
    assert message.endswith(" and 3 more")


@pytest.mark.parametrize(
    ("folders", "lost", "words"),
    [
        (["train", "test"], "images/test/sky", "only one of its splits has sky"),
        (["train", "test"], "images/train/apple", "only one of its splits has apple"),
        ([""], "images/sky", "has images of fewer than two classes"),
        (["test", "pictures"], "images/pictures", "has no train split"),
        ([""], "images", "is no folder"),
    ],
)
def test_what_the_layout_lacks_is_said(folders, lost, words):
    fill(*folders)
    shutil.rmtree(lost)
    assert re.match(f"data.source = images: {words}; take cifar10.md5, or", refusal(main))


@pytest.mark.parametrize(
    ("folders", "classes", "extra", "words"),
    [
        ([""], ("bus", "train"), "", "0.5 of it becomes one"),
        ([""], ("apple", "sky"), "train", "images: ignored train"),
        (["train"], ("apple", "sky"), "test/0.png", "images: ignored test"),
        (["train", "test"], ("apple", "sky"), "train/bird/0.png", "8 images"),
    ],
)
def test_what_only_looks_like_a_split_is_none(here, capsys, folders, classes, extra, words):
    set_params(here, {"data.classes": list(classes)})
    fill(*folders, classes=classes)
    if extra:
        save_image(Path("images", extra), format="png")
    main()
    assert prepared()[1] in ([0] * 2 + [1] * 2, [0] * 4 + [1] * 4)
    assert re.search(words, capsys.readouterr().out)


def test_splits_without_class_folders_are_no_classes():
    fill("", classes=("train", "test"))
    assert "images: train and test have no class folders; take" in refusal(main)


@pytest.mark.skipif(os.name == "nt", reason="links need a permission on Windows")
@pytest.mark.parametrize("place", ["train/apple/more", "test/more"])
def test_links_to_folders_are_refused_and_links_to_images_are_read(here, place):
    fill("train", "test", "../elsewhere")
    Path("images/train/sky/4.png").symlink_to(here / "elsewhere/sky/0.png")
    main()
    assert prepared()[0] == [0] * 4 + [1] * 5
    Path("images", place).symlink_to(here / "elsewhere/sky")
    assert refusal(main).startswith(f"{Path('images', place)}: is a link to a folder")


def test_only_the_wanted_classes_remain_numbered_as_wanted(here):
    fill("train", "test", classes=("apple", COMPOSED))
    fill("train", "test", classes=("zebra", "sky"))
    set_params(here, {"data.classes": ["sky", DECOMPOSED, "apple"]})
    main()
    assert load_json("classes") == ["sky", COMPOSED, "apple"]
    images, labels, _ = load_split("test")
    assert labels.bincount().tolist() == [4, 4, 4]
    assert images[labels == 2].float().mean((0, 1, 2)).tolist() == [255, 0, 0]
    set_params(here, {"data.classes": ["sky", "lynx"]})
    assert refusal(main).startswith("data.classes: no class lynx; there are apple, caf")


@pytest.mark.parametrize(
    ("sizes", "share", "quotas"),
    [
        ([1000, 100, 10, 2], 0.1, [100, 10, 1, 1]),
        ([10] * 3, 0.01, [1] * 3),  # never none
        ([10] * 3, 0.99, [9] * 3),  # never all
        ([2, 3, 4, 5], 0.5, [1, 2, 2, 2]),
    ],
)
def test_the_rounded_share_of_each_class_is_drawn_at_random(sizes, share, quotas):
    labels, draws = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), []
    for seed in (0, 0, 1):
        rest, drawn = stratified(labels, share, list("abcd"[: len(sizes)]), seed, "share")
        assert sorted([*rest, *drawn]) == list(range(len(labels)))
        assert rest.tolist() == sorted(rest)
        assert labels[drawn].bincount().tolist() == quotas
        draws.append(drawn.tolist())
    assert draws[0] == draws[1] != draws[2] != sorted(draws[2])


def test_a_class_with_a_single_image_is_refused():
    labels = torch.tensor([0, 0, 0, 1])
    message = refusal(lambda: stratified(labels, 0.5, ["a", "b"], 0, "the.setting"))
    assert message == "the.setting = 0.5: needs 2 different images or more of b"


def test_few_images_are_balanced_and_larger_sets_include_smaller_ones():
    labels = torch.arange(4).repeat_interleave(torch.tensor([1000, 100, 10, 2]))
    index, before = torch.arange(5, 1112), set()  # 995 of the first class
    for count, counts in ((4, [1, 1, 1, 1]), (40, [14, 14, 10, 2]), (1107, [995, 100, 10, 2])):
        drawn = balanced(labels, index, count, seed=0).tolist()
        assert drawn == sorted(set(drawn))
        assert before <= set(drawn) <= set(index.tolist())
        assert labels[drawn].bincount().tolist() == counts
        before = set(drawn)
    assert balanced(labels, index, 40, seed=1).tolist() != balanced(labels, index, 40, 0).tolist()


@pytest.mark.parametrize("count", [3, 41])
def test_more_or_fewer_images_than_there_can_be_are_refused(count):
    message = refusal(lambda: balanced(torch.arange(4).repeat(10), torch.arange(40), count, 0))
    words = "must be at least 4, one of each class, and at most 40, the training images without"
    assert message.startswith(f"train.shared.images = {count}: {words}")
