"""Figures of any number of classes, with any names."""

import json

import numpy as np
import pytest
from fontTools.ttLib import TTFont
from helpers import ROOT, dvc, per_class, python, set_params
from matplotlib import get_data_path
from matplotlib.text import Text
from PIL import Image

from stages.render import changed
from tools import demo
from transfer import figures

DRAW = [figures.confusion, figures.per_class]
NAMES = ["US$5_$10", "EUR", r"$\frac", "a_b^c", "%s {0} {x}", "<b>&lt;", "W" * 60]


def matrices(classes: int) -> dict[str, np.ndarray]:
    """The predictions of each mode, most of them right except for the first 30 classes."""
    draw, right = np.random.default_rng(0), np.diag(50 * (np.arange(classes) >= 30) + 5)
    return {mode: draw.integers(0, 3, (classes, classes)) + right for mode in figures.COLOURS}


@pytest.mark.parametrize("classes", [2, 1000])
@pytest.mark.parametrize("draw", DRAW)
def test_the_hardest_of_any_number_of_classes_are_drawn(tmp_path, classes, draw):
    names = [f"no. {number}" for number in range(classes)]
    figure = draw(matrices(classes), names)
    assert {*names[:30]} == {*names} & {text.get_text() for text in figure.findobj(Text)}
    figures.save(figure, tmp_path / "figure.png")
    size = Image.open(tmp_path / "figure.png").size
    assert 200 < min(size) < max(size) < 3300


def test_names_are_drawn_literally_as_far_as_they_fit(tmp_path, capsys):
    images, best = np.zeros((7, 8, 8, 3), np.uint8), [(name, 1.0) for name in NAMES]
    both = {"frozen": best, "finetuned": best[::-1]}
    grid = figures.image_grid(images, NAMES, both, {"title": range(7)}, names_are_true=True)
    assert [t.get_text() for t in grid.axes[1].texts] == ["EUR", "✓ EUR 100%", "✗ <b>&lt; 100%"]
    widths = [text.get_window_extent().width for axes in grid.axes for text in axes.texts]
    assert max(widths) < 1.72 * grid.dpi  # from image to image
    for figure in (grid, *(draw(matrices(7), NAMES) for draw in DRAW)):
        assert {*NAMES[:6]} <= {text.get_text() for text in figure.findobj(Text)}
        figures.save(figure, tmp_path / "figure.png")
    assert capsys.readouterr().out == ""


def test_images_that_one_mode_alone_has_right_are_shown_surest_first():
    predictions = {
        "label": [0, 0, 1, 1, 0], "frozen": [0, 1, 0, 1, 1], "finetuned": [1, 0, 1, 1, 0],
        "frozen_confidence": [0.9] * 5, "finetuned_confidence": [0.9, 0.6, 0.8, 0.9, 0.6],
    }  # fmt: skip
    found = changed(predictions)
    assert [heading[:35] for heading in found] == [
        "Only finetuned is right: 3 of 5 tes", "Only frozen is right: 1 of 5 test i"
    ]  # fmt: skip
    assert [list(numbers) for numbers in found.values()] == [[2, 1, 4], [0]]
    best = {mode: [("a", 1.0)] * 5 for mode in figures.COLOURS}
    none = {"none": np.arange(0)}
    for sections, count in ((found | none, 4), (none, 0)):
        grid = figures.image_grid(np.zeros((5, 8, 8, 3), np.uint8), ["a"] * 5, best, sections)
        assert len(grid.axes) == count
        figures.plt.close(grid)


def test_boxes_are_reported_once_and_a_usual_font_saves_them(tmp_path, capsys):
    figures.save(figures.per_class(matrices(2), ["\ue123", "\U0010fffd"]), tmp_path / "figure.png")
    assert capsys.readouterr().out.count("figure.png: shows boxes") == 1
    font = TTFont(f"{get_data_path()}/fonts/ttf/STIXGeneral.ttf")
    for record in font["name"].names:
        record.string = "Unifont"
    font.save(tmp_path / "font.ttf")
    use = "from matplotlib import font_manager as m; m.fontManager.addfont('font.ttf')"
    draw = "from transfer.figures import *; plt.figure().text(0, 0, '\u0359')"
    code = f"{use}\n{draw}\nsave(plt.gcf(), Path('figure.png'))"
    done = python(tmp_path, "-c", code, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.faults
def test_classes_of_any_name_go_through_the_whole_pipeline(project):
    names = ["US$5_$10", "accuracy", "a|b", "caf\u00e9", "\u732b"]
    for split in (project / "stripes/train", project / "stripes/test"):
        for old, new in zip(demo.CLASSES, names, strict=False):
            (split / old).rename(split / new)
    set_params(project, {"data": {"classes": names}})
    dvc(project, "repro")
    values = json.loads((project / "metrics/evaluation.json").read_text("utf-8"))
    for mode, recalls in per_class(project).items():
        assert list(recalls) == names
        assert values[f"{mode}.accuracy"] == pytest.approx(sum(recalls.values()) / 5)
