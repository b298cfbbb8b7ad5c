import csv
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import python, refusal, set_params
from PIL import Image

from stages import download, evaluate
from tools import predict
from transfer.common.paths import PREDICTIONS, PREPARED, model_path
from transfer.common.settings import MODES
from transfer.model import build, save_weights
from transfer.sources.images import read_image

NUMBERS, FILE, DRAWN = (0, 2, 50, 199), Path("2.png"), Path("predictions.png")


@pytest.fixture
def run(project, monkeypatch, capsys):
    """A function that predicts files, in the project with some test images: the lines printed."""
    monkeypatch.chdir(project)
    images = np.load(PREPARED / "test_images.npy")
    for number in NUMBERS:
        Image.fromarray(images[number]).save(f"{number}.png")

    def run(*paths: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["predict", *paths])
        capsys.readouterr()
        predict.main()
        return capsys.readouterr().out.splitlines()

    return run


def test_predictions_are_those_of_the_evaluation(project, run):
    set_params(project, {"model": {"image_size": 48}})  # images are stored with 32
    evaluate.main()
    rows = list(csv.DictReader(PREDICTIONS.read_text("utf-8").splitlines()))
    long = f"{'a_long_name_' * 12}.jpg"
    Image.open(FILE).resize((1600, 1200), Image.Resampling.BICUBIC).save(long)
    Image.fromarray(read_image(long, 32)).save("small.png")
    files = [*(f"{number}.png" for number in NUMBERS), "small.png", long]
    done = python(project, "-m", "tools.predict", *files, COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    header, *lines, last = (line.split() for line in done.stdout.splitlines())
    assert [header, last] == [["image", "mode", *predict.RANKS], ["drawn", "in", str(DRAWN)]]
    for i, (file, mode, *ranked) in enumerate(lines[:8]):
        row, shares = rows[NUMBERS[i // 2]], [float(share[:-1]) for share in ranked[::2]]
        assert (file, mode, ranked[1]) == (files[i // 2], MODES[i % 2], row[mode])
        assert shares[0] == pytest.approx(100 * float(row[f"{mode}_confidence"]), abs=0.06)
        assert shares == sorted(shares, reverse=True)
    assert [line[1:] for line in lines[8:10]] == [line[1:] for line in lines[10:]]
    assert [line[0] for line in lines[8::2]] == ["small.png", f"{long[:5]}…{long[-6:]}"]
    assert 1000 < Image.open(DRAWN).width < 1200  # six images in a row


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("name", [b"\xff.png", b"two\nlines.png", b"\xc3\xa9 | $\\frac x$ 5%.png"])
def test_a_file_may_have_any_name(run, name):
    os.rename(FILE, os.fsdecode(name))
    assert len(run(os.fsdecode(name))) == 4  # a header, a line for each mode, where it is drawn
    os.truncate(name, 50)
    assert "damaged" in refusal(lambda: run(os.fsdecode(name)))


REFUSED = {
    "2.png: is damaged": lambda: os.truncate(FILE, 600),
    "2.png: is empty, damaged or not an image": lambda: FILE.write_text("no image", "utf-8"),
    "2.png: No such file": FILE.unlink,
    "2.png: is not a regular file": lambda: FILE.rename("other.png") and FILE.mkdir(),
    "models.finetuned.safetensors: cannot be read: .*; run dvc repro": model_path(MODES[1]).unlink,
    "data.prepared.classes.json: .*run dvc repro": (PREPARED / "classes.json").unlink,
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_before_anything_is_predicted(run, capsys, message):
    REFUSED[message]()
    assert re.match(message, refusal(lambda: run("0.png", "2.png")))
    assert capsys.readouterr().out == ""
    assert not DRAWN.exists()


@pytest.mark.parametrize(("count", "words"), [(0, "required: IMAGE"), (101, "at most 100")])
def test_no_image_or_too_many_are_refused_with_the_usage(run, capsys, count, words):
    with pytest.raises(SystemExit, match="2"):
        run(*["0.png"] * count)
    assert re.match(rf"usage: python -m tools\.predict (.|\n)*{words}", capsys.readouterr().err)


def test_two_classes_give_two_predictions(params, project, run):
    set_params(project, {"data": {"classes": ["dog", "cat"]}})
    download.main()
    for mode in MODES:
        save_weights(model_path(mode), build(params.model, 2))
    assert [{*line.split()[3::2]} for line in run("0.png")[1:3]] == [{"dog", "cat"}] * 2
