"""Figures of any number of classes, with any names, the same on every machine."""

import numpy as np
import pytest
from helpers import ROOT, python
from matplotlib.text import Text
from PIL import Image

from transfer import figures

NAMES = ["US$5_$10", "EUR", r"$\frac", "a_b^c", "%s {0} {x}", "<b>&lt;", "W" * 60]
COUNTS = np.array([[[995, 5], [504, 496]], [[985, 15], [0, 1000]]])  # frozen, finetuned


def texts(part) -> list[str]:
    return [text.get_text() for text in part.findobj(Text)]


def confusion(counts, names):
    return figures.confusion([counts, counts], names)


def per_class(counts, names):
    recall = counts.diagonal() / counts.sum(1)
    rows = zip(names, recall, strict=True)
    return figures.per_class(
        [
            {"class": name, "frozen_recall": r, "finetuned_recall": r, "mcnemar_p": 1}
            for name, r in rows
        ]
    )


@pytest.mark.parametrize("classes", [2, 1000])
@pytest.mark.parametrize("draw", [confusion, per_class])
def test_the_hardest_of_any_number_of_classes_are_drawn(tmp_path, draw, classes):
    names = [f"no. {number}" for number in range(classes)]
    most = np.diag(50 * (np.arange(classes) >= 30) + 5)  # of the first 30 classes few are correct
    figure = draw(most + 1, names)
    assert {*names[:30]} == {*names} & {*texts(figure)}
    assert any("he 30 hardest" in text for text in texts(figure)) == (classes == 1000)
    figures.save(figure, tmp_path / "figure.png")
    size = Image.open(tmp_path / "figure.png").size
    assert 400 < min(size) < max(size) < 6600


def test_the_confusion_matrix_and_what_fine_tuning_changed_in_it():
    left, right = figures.confusion(COUNTS, ["a", "b"]).axes
    assert [text.get_text() for text in left.texts] == ["985", "15", "·", "1000"]
    assert [text.get_text() for text in right.texts] == ["-10", "+10", "-504", "+504"]
    assert left.get_title("left") == "finetuned: most often a is taken for b"
    blue = right.images[0].get_array()  # better
    assert (np.sign(blue) == [[-1, -1], [1, 1]]).all()


def test_clear_changes_of_classes_are_marked_and_the_hardest_class_is_at_the_bottom():
    header = ("class", "frozen_recall", "finetuned_recall", "mcnemar_p")
    rows = [("a", "0.995", "0.985", "0.06"), ("b", "0.5", "1.0", "0.04")]
    axes = figures.per_class([dict(zip(header, row, strict=True)) for row in rows]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]
    assert [text.get_text() for text in axes.texts] == ["+50.0 *", "-1.0"]
    assert axes.get_title("left") == "Fine-tuning helps 1 of 2 classes"


@pytest.mark.parametrize("sections", [{"seven": 7}, {"one": 1}, {"none": 0}, {"none": 0, "six": 6}])
def test_images_have_names_of_any_characters_as_far_as_they_fit(tmp_path, sections):
    best = [(name, 0.9951) for name in NAMES]
    both = {"frozen": best, "finetuned": best[::-1]}
    shown = {heading: np.arange(count) for heading, count in sections.items()}
    images = np.zeros((7, 8, 8, 3), np.uint8)
    figure = figures.image_grid(images, NAMES, both, shown, names_are_true=True)
    figures.save(figure, tmp_path / "figure.png")
    labels = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert len(labels) == sum(sections.values())
    # Beside the first image of a row stands what each line is.
    assert [found[1::2] for found in labels[:1]] in ([], [["class", "frozen", "finetuned"]])
    assert labels[1:2] in ([], [["EUR", "✓ EUR, >99 %", "✗ <b>&lt;, >99 %"]])
    assert labels[6:] in ([], [["WWWWWWWW…WWWWWWW", "✓ WWWWW…WWWW, >99 %", "✗ US$5_$10, >99 %"]])
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
