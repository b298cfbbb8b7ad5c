"""Figures of any number of classes, with any names, the same on every machine."""

import numpy as np
import pytest
from helpers import ROOT, python
from matplotlib.text import Text
from PIL import Image

from transfer import figures

DRAW = [figures.confusion, figures.per_class]
NAMES = ["US$5_$10", "EUR", r"$\frac", "a_b^c", "%s {0} {x}", "<b>&lt;", "W" * 60]
COUNTS = {"frozen": np.array([[995, 5], [504, 496]]), "finetuned": np.array([[985, 15], [4, 996]])}


def texts(part) -> list[str]:
    return [text.get_text() for text in part.findobj(Text)]


@pytest.mark.parametrize("classes", [2, 1000])
@pytest.mark.parametrize("draw", DRAW)
def test_the_hardest_of_any_number_of_classes_are_drawn(tmp_path, draw, classes):
    names = [f"no. {number}" for number in range(classes)]
    most = np.diag(50 * (np.arange(classes) >= 30) + 5)  # of the first 30 classes few are correct
    figure = draw(dict.fromkeys(figures.COLOURS, most + 1), names)
    assert {*names[:30]} == {*names} & {*texts(figure)}
    assert any("the 30 hardest of 1,000" in text for text in texts(figure)) == (classes == 1000)
    figures.save(figure, tmp_path / "figure.png")
    size = Image.open(tmp_path / "figure.png").size
    assert 200 < min(size) < max(size) < 3300


def test_half_a_percent_is_shown_as_one_less_as_a_dot_and_the_hardest_class_is_at_the_bottom():
    left, right = figures.confusion(COUNTS, ["a", "b"]).axes
    assert [text.get_text() for text in left.texts] == ["100", "1", "50", "50"]
    assert [text.get_text() for text in right.texts] == ["99", "2", "·", "100"]
    assert right.get_title("left") == "finetuned: accuracy 99.05 %"
    axes = figures.per_class(COUNTS, ["a", "b"]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]
    assert [text.get_text() for text in axes.texts] == ["+50.0", "-1.0"]


@pytest.mark.parametrize("sections", [{"seven": 7}, {"one": 1}, {"none": 0}, {"none": 0, "six": 6}])
def test_images_have_names_of_any_characters_as_far_as_they_fit(tmp_path, sections):
    best = [(name, 1.0) for name in NAMES]
    both = {"frozen": best, "finetuned": best[::-1]}
    shown = {heading: np.arange(count) for heading, count in sections.items()}
    images = np.zeros((7, 8, 8, 3), np.uint8)
    figure = figures.image_grid(images, NAMES, both, shown, names_are_true=True)
    figures.save(figure, tmp_path / "figure.png")
    labels = [texts(axes)[:3] for axes in figure.axes]
    assert len(labels) == sum(sections.values())
    assert labels[1:2] in ([], [["EUR", "✓ EUR 100%", "✗ <b>&lt; 100%"]])
    assert labels[6:] in ([], [["WWWWWWWW…WWWWWWWW", "✓ WWWWW…WWWWW 100%", "✗ US$5_$10 100%"]])
    assert {*sections} <= {*texts(figure)}


def test_the_same_figure_has_the_same_bytes_whatever_the_machine_is_set_to(tmp_path):
    (tmp_path / "matplotlibrc").write_text("figure.facecolor: red\n", encoding="utf-8")
    code = f"""from transfer.figures import *
from numpy import array
save(confusion({COUNTS!r}, ["a", "b"]), Path("there.png"))"""
    variables = {"MATPLOTLIBRC": "matplotlibrc", "MPLBACKEND": "module://missing"}
    done = python(tmp_path, "-c", code, PYTHONPATH=str(ROOT), **variables)
    assert (done.returncode, done.stderr) == (0, "")
    figures.save(figures.confusion(COUNTS, ["a", "b"]), tmp_path / "here.png")
    assert (tmp_path / "here.png").read_bytes() == (tmp_path / "there.png").read_bytes()
