import csv
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import refusal, set_params
from PIL import Image
from torch import nn

from stages import download, evaluate
from tools import predict
from tools.isolated import environment
from transfer.common.errors import exit_cleanly
from transfer.common.settings import MODES, load_params
from transfer.inference import to_input
from transfer.model import build, save_weights
from transfer.sources.images import read_image

DRAWN = "predictions.png"


def image(project, number: int) -> Image.Image:
    """A test image as it is stored."""
    return Image.fromarray(np.load(project / "data/prepared/test_images.npy")[number])


@pytest.fixture
def run(project, monkeypatch):
    """Run the tool's main on the files given, in this process and in the project."""
    monkeypatch.chdir(project)

    def call(*paths: str) -> None:
        monkeypatch.setattr(sys, "argv", ["predict", *paths])
        predict.main()

    return call


@pytest.fixture
def evaluated(project, monkeypatch) -> list[dict[str, str]]:
    """What metrics/predictions.csv holds of models that tell images apart.

    Those that the pipeline trained so briefly predict the same for all. These have random weights,
    but statistics of real images, and scale them to another size than they are stored at.
    """
    monkeypatch.chdir(project)
    set_params(project, {"model": {"image_size": 48}})
    images = torch.from_numpy(np.load(project / "data/prepared/test_images.npy"))
    torch.manual_seed(0)
    for mode in MODES:
        network = build(load_params().model, 10)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # statistics become those of the next batch
        with torch.no_grad():
            network.head[-1].weight *= 5
            network.train()(to_input(images, 48))
        save_weights(project / f"models/{mode}.safetensors", network)
    evaluate.main()
    with (project / "metrics/predictions.csv").open() as file:
        return list(csv.DictReader(file))


def test_predictions_are_printed_and_drawn(project, evaluated):
    numbers = [0, 1, 2, 3]
    for number in numbers:
        image(project, number).save(project / f"{number}.png")
    large, small = f"{'a_long_name_' * 12}.jpg", "small.png"
    image(project, 4).resize((1600, 1200), Image.Resampling.BICUBIC).save(project / large)
    Image.fromarray(read_image(project / large, 32)).save(project / small)
    done = subprocess.run(
        [sys.executable, "-m", "tools.predict", *(f"{n}.png" for n in numbers), large, small],
        cwd=project, env=environment(), text=True, capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")

    header, *lines, last = (line.split() for line in done.stdout.splitlines())
    assert header == ["image", "mode", "first", "second", "third"]
    assert last == ["drawn", "in", DRAWN]
    for line in lines:
        shares = [float(share.removesuffix("%")) for share in line[2::2]]
        assert len(shares) == len(set(line[3::2])) == 3
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 100.2
    for number in numbers:
        for name, mode, share, label, *_ in lines[2 * number : 2 * number + 2]:
            row = evaluated[number]
            assert (name, label) == (f"{number}.png", row[mode])
            assert float(share.removesuffix("%")) / 100 == pytest.approx(
                float(row[f"{mode}_confidence"]), abs=0.0006
            )
    assert [line[1] for line in lines] == [*MODES] * 6
    assert len({tuple(line[1:]) for line in lines[:10]}) == 10
    assert [line[1:] for line in lines[8:10]] == [line[1:] for line in lines[10:]]
    assert lines[8][0] == "a_long_name_a_long_n…me_a_long_name_.jpg"

    with Image.open(project / DRAWN) as drawn:
        assert 1000 < drawn.width < 1200
        assert 300 < drawn.height < 400
    subprocess.run(["git", "check-ignore", "--quiet", DRAWN], cwd=project, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize(
    "name", [b"\xff\xfe.png", b"two\nlines.png", "caf\u00e9 | $x$.png".encode()]
)
def test_a_file_may_have_any_name(project, run, capsys, name):
    image(project, 0).save(project / "plain.png")
    os.rename(project / "plain.png", os.path.join(os.fsencode(project), name))
    run(os.fsdecode(name))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # a header, a line for each mode, where it is drawn
    assert (project / DRAWN).exists()
    os.truncate(os.path.join(os.fsencode(project), name), 50)
    with pytest.raises(SystemExit) as ended:
        exit_cleanly(lambda: run(os.fsdecode(name)))
    assert re.fullmatch("error: .*damaged.*", ended.value.code)  # no line break


def damaged(project) -> str:
    image(project, 0).save(project / "whole.png")
    (project / "cut.png").write_bytes((project / "whole.png").read_bytes()[:600])
    return r"cut\.png: is damaged"


def no_image(project) -> str:
    (project / "cut.png").write_text("not a picture")
    return r"cut\.png: is empty, damaged or not an image"


def missing(project) -> str:
    return r"cut\.png: No such file"


def a_folder(project) -> str:
    (project / "cut.png").mkdir()
    return r"cut\.png: Is a directory"


def no_model(project) -> str:
    image(project, 0).save(project / "cut.png")
    (project / "models/finetuned.safetensors").unlink()
    return r"models/finetuned\.safetensors: cannot be read: .*; run dvc repro"


def no_data(project) -> str:
    (project / "data/prepared/classes.json").unlink()
    return r"data/prepared/classes\.json: .*run dvc repro"


@pytest.mark.parametrize("spoil", [damaged, no_image, missing, a_folder, no_model, no_data])
def test_bad_input_is_refused_before_anything_is_predicted(project, run, monkeypatch, spoil):
    message = spoil(project)
    image(project, 1).save(project / "good.png")
    monkeypatch.setattr(predict, "predict", lambda *_: pytest.fail("predicted"))
    assert re.search(message, refusal(lambda: run("good.png", "cut.png")))
    assert not (project / DRAWN).exists()


@pytest.mark.parametrize(
    ("paths", "words"), [([], "required: IMAGE"), (["a.png"] * 101, "at most 100 at a time")]
)
def test_no_image_or_too_many_are_refused_with_the_usage(run, capsys, paths, words):
    with pytest.raises(SystemExit, match="2"):
        run(*paths)
    usage, *_, last = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: python -m tools.predict")
    assert words in last


def test_two_classes_give_two_predictions_for_a_file_of_any_name(params, project, run, capsys):
    set_params(project, {"data": {"classes": ["dog", "cat"]}})
    download.main()
    for mode in MODES:
        network = build(params.model, 2)
        save_weights(project / f"models/{mode}.safetensors", network)
    name = "$\\frac 1 2$ 100%.png"
    image(project, 0).save(project / name)
    capsys.readouterr()
    run(name)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["image", "mode", "first", "second"]
    for mode, line in zip(MODES, lines, strict=False):
        assert line.startswith(f"{name}  {mode}")
        assert {"dog", "cat"} < set(line.split())
    assert (project / DRAWN).exists()
