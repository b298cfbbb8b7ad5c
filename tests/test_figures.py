"""Figures of any number of classes, with any names."""

import json
import time

import numpy as np
import psutil
import pytest
from helpers import dvc, save_image, set_params
from matplotlib import font_manager
from PIL import Image

from transfer import figures


def matrices(classes: int, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        mode: draw.integers(0, 3, (classes, classes)) + 20 * np.eye(classes, dtype=int)
        for mode in ("frozen", "finetuned")
    }


@pytest.mark.parametrize("classes", [2, 10, 37, 100, 1000])
@pytest.mark.parametrize("draw", [figures.confusion, figures.per_class])
def test_size_and_cost_are_bounded_for_any_number_of_classes(tmp_path, classes, draw):
    names = [f"class number {number}" for number in range(classes)]
    start = time.process_time()
    figures.save(draw(matrices(classes), names), tmp_path / "figure.png")
    assert time.process_time() - start < 30  # 171 s with 200 classes, before there was a bound
    with Image.open(tmp_path / "figure.png") as image:
        assert 400 < image.width < 3300
        assert 200 < image.height < 2000
    assert psutil.Process().memory_info().rss < 4 * 2**30


def test_of_many_classes_the_hardest_are_shown():
    easy = matrices(100)
    for counts in easy.values():
        counts[np.arange(40), np.arange(40)] = 0
    shown = figures.hardest(easy)
    assert len(shown) == figures.MOST_CLASSES
    assert set(shown) <= set(range(40))


MARKUP = ["US$5_$10", "EUR", r"$\frac", "a_b^c", "%s {0} {x}", "<b>&amp;</b>", "x" * 300]


def test_names_are_never_interpreted(tmp_path):
    count = len(MARKUP)
    figures.save(figures.confusion(matrices(count), MARKUP), tmp_path / "confusion.png")
    figures.save(figures.per_class(matrices(count), MARKUP), tmp_path / "per_class.png")
    numbers = list(range(count))
    predictions = {"label": numbers, "frozen": numbers, "finetuned": numbers[::-1]}
    predictions |= {f"{mode}_confidence": [0.5] * count for mode in ("frozen", "finetuned")}
    images = np.zeros((count, 8, 8, 3), np.uint8)
    figures.save(figures.first_batch(images, predictions, MARKUP), tmp_path / "batch.png")
    best = {mode: [(name, 0.5) for name in MARKUP] for mode in ("frozen", "finetuned")}
    figures.save(figures.predictions(images, MARKUP, best), tmp_path / "predictions.png")
    assert len(list(tmp_path.iterdir())) == 4


def test_characters_that_no_font_has_are_said_once(capsys):
    figures.use_fonts_for(["plain", "caf\u00e9"])
    assert capsys.readouterr().out == ""
    assert figures.plt.rcParams["font.family"] == [figures.FONT]
    figures.use_fonts_for(["\ue123\U0010fffd"])
    assert capsys.readouterr().out.count("no font of this system has") == 1
    figures.use_fonts_for([])


def test_a_font_of_the_system_is_used_for_characters_that_the_usual_one_lacks(capsys):
    usual = font_manager.get_font(font_manager.findfont(figures.FONT)).get_charmap()
    character = next(
        chr(code)
        for entry in font_manager.fontManager.ttflist
        for code in font_manager.get_font(entry.fname).get_charmap()
        if code not in usual and chr(code).isprintable() and "Last Resort" not in entry.name
    )
    figures.use_fonts_for([character])
    assert figures.plt.rcParams["font.family"][0] == figures.FONT
    assert len(figures.plt.rcParams["font.family"]) == 2
    assert capsys.readouterr().out == ""
    figures.use_fonts_for([])


@pytest.mark.faults
def test_ones_own_classes_of_any_name_go_through_the_whole_pipeline(project):
    names = ["US$5_$10", "accuracy", "a|b", "caf\u00e9", "\u732b"]
    for split, count in (("train", 12), ("test", 4)):
        for place, name in enumerate(names):
            for number in range(count):
                save_image(
                    project / "album" / split / name / f"{number}.png", 0, 0, 9 * place + 4, 30,
                    colour="blue",
                )  # fmt: skip
    shared = {"batch_size": 12, "validation_share": 0.2}
    train = {"shared": shared, "frozen": {"epochs": 1}, "finetuned": {"epochs": 1}}
    set_params(project, {"data": {"source": "album"}, "train": train})
    dvc(project, "repro")
    values = json.loads((project / "metrics/evaluation.json").read_text("utf-8"))
    for mode in ("frozen", "finetuned"):
        recalls = values["recall"][mode]
        assert sorted(recalls) == sorted(names)
        assert values[f"{mode}.accuracy"] == pytest.approx(sum(recalls.values()) / 5)
    with Image.open(project / "figures/first_batch.png") as image:
        assert image.width > 500
