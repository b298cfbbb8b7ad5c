import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from stages import download, evaluate
from tools import demo, predict
from transfer import data, model, params
from transfer.errors import InputError

DRAWN = "predictions.png"


def picture(project, number: int) -> Image.Image:
    """A test picture as it is stored."""
    return Image.fromarray(np.load(project / "data/cifar10/test_images.npy")[number])


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
    """What metrics/predictions.csv holds of models that tell pictures apart.

    Those that the pipeline trained so briefly say the same of all. These have random weights, but
    statistics of real pictures, and scale them to another size than they are stored at.
    """
    monkeypatch.chdir(project)
    document = yaml.safe_load((project / "params.yaml").read_text())
    document["model"]["image_size"] = 48
    (project / "params.yaml").write_text(yaml.safe_dump(document))
    pictures = torch.from_numpy(np.load(project / "data/cifar10/test_images.npy"))
    torch.manual_seed(0)
    for mode in params.MODES:
        network = model.build(params.load().model, 10)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # statistics become those of the next batch
        with torch.no_grad():
            network.head[-1].weight *= 5
            network.train()(data.to_input(pictures, 48))
        model.save_state(project / f"models/{mode}.safetensors", network)
    evaluate.main()
    with (project / "metrics/predictions.csv").open() as file:
        return list(csv.DictReader(file))


def test_what_the_models_say_is_printed_and_drawn(project, evaluated):
    numbers = [0, 1, 2, 3]
    for number in numbers:
        picture(project, number).save(project / f"{number}.png")
    large, small = f"{'a_long_name_' * 12}.jpg", "small.png"
    picture(project, 4).resize((1600, 1200), Image.Resampling.BICUBIC).save(project / large)
    Image.fromarray(data.read_picture(project / large, 32)).save(project / small)
    done = subprocess.run(
        [sys.executable, "-m", "tools.predict", *(f"{n}.png" for n in numbers), large, small],
        cwd=project, env=demo.environment(), text=True, capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")

    header, *lines, last = (line.split() for line in done.stdout.splitlines())
    assert header == ["picture", "mode", "first", "second", "third"]
    assert last == ["drawn", "in", DRAWN]
    for line in lines:
        shares = [float(share.removesuffix("%")) for share in line[2::2]]
        assert len(shares) == len(set(line[3::2])) == 3
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 100.2
    for number in numbers:
        for name, mode, share, answer, *_ in lines[2 * number : 2 * number + 2]:
            row = evaluated[number]
            assert (name, answer) == (f"{number}.png", row[mode])
            assert float(share.removesuffix("%")) / 100 == pytest.approx(
                float(row[f"{mode}_confidence"]), abs=0.0006
            )
    assert [line[1] for line in lines] == [*params.MODES] * 6
    assert len({tuple(line[1:]) for line in lines[:10]}) == 10
    assert [line[1:] for line in lines[8:10]] == [line[1:] for line in lines[10:]]
    assert lines[8][0] == "a_long_name_a_long_n…me_a_long_name_.jpg"

    with Image.open(project / DRAWN) as image:
        assert 900 < image.width < 1200
        assert 1200 < image.height < 1400
    subprocess.run(["git", "check-ignore", "--quiet", DRAWN], cwd=project, check=True)


def damaged(project) -> str:
    picture(project, 0).save(project / "whole.png")
    (project / "cut.png").write_bytes((project / "whole.png").read_bytes()[:600])
    return r"cut\.png: is damaged or no picture"


def no_picture(project) -> str:
    (project / "cut.png").write_text("not a picture")
    return r"cut\.png: is empty, damaged or no picture"


def missing(project) -> str:
    return r"cut\.png: No such file"


def a_folder(project) -> str:
    (project / "cut.png").mkdir()
    return r"cut\.png: Is a directory"


def no_model(project) -> str:
    picture(project, 0).save(project / "cut.png")
    (project / "models/finetuned.safetensors").unlink()
    return r"models/finetuned\.safetensors: is missing; run dvc repro"


def no_data(project) -> str:
    (project / "data/cifar10/classes.txt").unlink()
    return r"data/cifar10/classes\.txt: .*run dvc repro"


@pytest.mark.parametrize("spoil", [damaged, no_picture, missing, a_folder, no_model, no_data])
def test_bad_input_is_refused_before_anything_is_predicted(project, run, monkeypatch, spoil):
    message = spoil(project)
    picture(project, 1).save(project / "good.png")
    monkeypatch.setattr(predict.training, "predict", lambda *_: pytest.fail("predicted"))
    with pytest.raises(InputError, match=message) as error:
        run("good.png", "cut.png")
    assert "\n" not in str(error.value)
    assert not (project / DRAWN).exists()


@pytest.mark.parametrize(
    ("paths", "words"), [([], "required: PICTURE"), (["a.png"] * 101, "at most 100 at a time")]
)
def test_no_picture_or_too_many_are_refused_with_the_usage(run, capsys, paths, words):
    with pytest.raises(SystemExit, match="2"):
        run(*paths)
    usage, *_, last = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: python -m tools.predict")
    assert words in last


def test_two_classes_give_two_answers_and_a_name_may_hold_anything(settings, project, run, capsys):
    document = yaml.safe_load((project / "params.yaml").read_text())
    document["data"]["classes"] = ["dog", "cat"]
    (project / "params.yaml").write_text(yaml.safe_dump(document))
    download.main()
    for mode in params.MODES:
        network = model.build(settings.model, 2)
        model.save_state(project / f"models/{mode}.safetensors", network)
    name = "$\\frac 1 2$ 100%.png"
    picture(project, 0).save(project / name)
    capsys.readouterr()
    run(name)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["picture", "mode", "first", "second"]
    for mode, line in zip(params.MODES, lines, strict=False):
        assert line.startswith(f"  {name}  {mode}")
        assert {"dog", "cat"} < set(line.split())
    assert (project / DRAWN).exists()
