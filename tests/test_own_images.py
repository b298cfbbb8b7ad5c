"""From a folder of photos to a model in use."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, dvc, python, refusal, save_image, set_params, with_settings
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from stages import download, evaluate, train
from tools.demo import striped
from tools.export import export
from transfer.data import Split, load_json, load_split, shift_and_flip, stratified
from transfer.images import read_image
from transfer.model import Network, load, predict, save
from transfer.run import model_path
from transfer.settings import load_params

PAGE = (ROOT / "docs/own-images.md").read_text(encoding="utf-8")
CODE = {key: code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S)
        for key in ("load_digits", "onnxruntime", "transfer.model") if key in code}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with settings for images in photos/, which has 30 different ones of two classes."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    set_params(tmp_path, {"data.source": "photos", "model.image_size": 16})
    for i in range(60):
        save_image(Path("photos", "ab"[i % 2], f"{i:02}.png"), 0, 0, i + 1, 20, size=(64, 20))
    return tmp_path


def drawn_names() -> set[str]:
    """Names of the files in the test split that `download` makes."""
    download.main()
    return {Path(name).name for name in load_json("test_names")}


def test_which_images_are_test_images_depends_on_their_files_alone(here):
    before = drawn_names()
    assert len(before) == 12
    set_params(here, {"seed": 5})
    assert drawn_names() == before
    save_image(Path("photos/a/new.png"), 0, 0, 3, 9, size=(64, 20))
    assert len(drawn_names() - {"new.png"} ^ before) <= 1
    Path("photos/a/new.png").unlink()
    renamed = sorted(before)[0]
    [old] = Path("photos").rglob(renamed)
    old.rename(old.with_name("renamed.png"))
    assert drawn_names() == before - {renamed} | {"renamed.png"}


def test_copies_lie_on_the_same_side_and_are_counted(here, capsys):
    for i, name in enumerate([*sorted(drawn_names())[:2], "03.png"]):
        [path] = Path("photos").rglob(name)
        shutil.copy(path, f"photos/{'ab'[i % 2]}/copy of {name}")
    names = drawn_names()
    for copy in ("copy of " + name for name in sorted(names) if f"copy of {name}" in names):
        assert copy.removeprefix("copy of ") in names
    assert "copies: 0 test images are also training images" in capsys.readouterr().out
    shutil.copytree("photos", "photos/train")
    shutil.copytree("photos/train", "photos/test")
    for name in "ab":
        shutil.rmtree(f"photos/{name}")
    download.main()
    assert re.search("copies: [1-9][0-9]+ test images are also", capsys.readouterr().out)


def test_the_first_test_images_are_of_all_classes_and_the_table_has_their_paths(here):
    download.main()
    labels, names = load_split("test").labels, load_json("test_names")
    assert labels[:2].tolist() in ([0, 1], [1, 0])
    assert [name[0] for name in names] == ["ab"[label] for label in labels]
    for name, image in zip(names, load_split("test").images.numpy(), strict=True):
        assert (read_image(here / "photos" / name, 16) == image).all()


def test_validation_images_depend_on_their_files_too(here):
    download.main()
    data = load_split("train")
    first, other = (
        stratified(data.labels, 0.3, ["a", "b"], seed, "", data.keys)[1] for seed in (0, 1)
    )
    assert set(first.tolist()) == set(other.tolist()) != set()


def test_a_large_jpeg_is_read_at_a_reduced_scale_with_nearly_the_same_result(tmp_path):
    smooth = np.linspace(0, 255, 1600 * 1200 * 3).reshape(1200, 1600, 3).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "large.jpg", quality=95)
    Image.fromarray(smooth).save(tmp_path / "large.png")
    got, wanted = (
        read_image(tmp_path / f"large.{kind}", 64).astype(int) for kind in ("jpg", "png")
    )
    assert abs(got - wanted).mean() < 2


def test_a_format_for_which_pillow_starts_another_program_is_refused(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    assert "is empty, damaged or not an image" in refusal(lambda: read_image(tmp_path / "a.eps", 8))


def test_without_flip_no_image_is_mirrored():
    ramp = torch.arange(8, dtype=torch.uint8).expand(50, 8, 8)[..., None].expand(-1, -1, -1, 3)
    stream = train.random_stream
    for flips in (True, False):
        moved = shift_and_flip(ramp, torch.arange(50), 0, flips, stream(0))[:, 0, 0, 0]
        assert (moved == 7).any() == flips


def test_balanced_class_weights_help_a_rare_class(params):
    """400 images of one class and 40 of another: 83 and 97 % when this was written."""
    images, labels = striped(6000, 0)
    both = np.flatnonzero((labels == 3) | (labels == 5))
    training, test = both[:-400], both[-400:]
    rare = labels[training] == 5
    training = training[~rare | (rare.cumsum() <= 40)]
    data = Split(torch.from_numpy(images), torch.from_numpy((labels == 5).astype(int)))
    scores = {}
    for weights in (None, "balanced"):
        longer = {"train.frozen.epochs": 10, "train.shared.class_weights": weights}
        settings = with_settings(params, longer)
        torch.manual_seed(0)
        network = Network(settings.model, ["common", "rare"])
        index = torch.from_numpy(training)
        train.train("frozen", network, data, index, torch.from_numpy(test), settings)
        predicted = predict(network, data.images, torch.from_numpy(test)).argmax(1)
        scores[weights] = balanced_accuracy_score(data.labels[test], predicted)
    assert scores["balanced"] > scores[None]


def test_evaluate_refuses_models_of_other_classes(project, monkeypatch):
    monkeypatch.chdir(project)
    network = load(model_path("frozen"))
    network.classes = [*network.classes[1:], "another"]
    model_path("frozen").unlink()
    save(network, model_path("frozen"))
    assert "models/frozen.safetensors: has other classes than the data" in refusal(evaluate.main)


@pytest.mark.parametrize("key", ["onnxruntime", "transfer.model"])
def test_the_code_of_the_page_uses_a_model(project, key):
    """An exported one without torch and this project. Photos are often turned or transparent."""
    [picture] = project.glob("stripes/test/angle 3/00003.png")
    image, exif = Image.open(picture).convert("RGBA"), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.putalpha(Image.new("L", image.size, 0))
    image.rotate(90).save(picture.with_name("blank.png"), exif=exif)
    Image.new("RGB", image.size, "white").save(picture.with_name("white.png"))
    image.putalpha(255)
    image.rotate(90).save(picture.with_name("turned.png"), exif=exif)
    code, names = CODE[key], ["00003"]
    if key == "onnxruntime":
        assert python(project, "-m", "tools.export", "finetuned").returncode == 0
        code = f"import sys; sys.modules |= dict.fromkeys(('torch', 'transfer'))\n{code}"
        names += ["turned", "blank", "white"]
    said = {}
    for name in names:
        done = python(project, "-c", code.replace("digits/3/0003", f"stripes/test/angle 3/{name}"))
        assert done.stdout.startswith("angle "), done.stderr
        said[name] = done.stdout
    assert said.get("turned", said["00003"]) == said["00003"]
    assert said.get("blank") == said.get("white")


def test_an_exported_model_agrees_with_prediction(project, monkeypatch):
    """Of noise, which shows every rounding, in images that are shrunk and enlarged."""
    monkeypatch.chdir(project)
    network = load(model_path("finetuned"))
    for pixels in (19, 224):
        noise = torch.randint(0, 256, (40, pixels, pixels, 3), dtype=torch.uint8)
        assert export(network, noise, Path("a.onnx")) < 1e-4


def test_a_setting_that_no_stage_reads_is_refused(project):
    output = dvc(project, "exp", "run", "-S", "+train.lr=0.1", fails=True)
    assert "error: params.yaml: train.lr = 0.1: Extra inputs are not permitted" in output


def test_the_description_of_a_model_is_in_its_file(reproduced):
    network = load(reproduced / model_path("finetuned"))
    assert network.pixels == 32
    assert network.settings == load_params(str(reproduced / "params.yaml")).model
    prepared = (reproduced / "data/prepared/classes.json").read_text(encoding="utf-8")
    assert network.classes == json.loads(prepared)
