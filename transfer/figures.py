"""Every figure, in the colours of Okabe and Ito, which the colour-blind tell apart.

Whatever a user names (classes, files) is drawn as plain text, and the size of a figure is bounded.
"""

import bisect
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transfer.common.files import replacing

# A notebook sets MPLBACKEND for all that it starts; matplotlib fails where it cannot import that.
os.environ["MPLBACKEND"] = "Agg"
from matplotlib import font_manager, ticker
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure

COLOURS = {"frozen": "#0072B2", "finetuned": "#D55E00"}
MARKERS = {"frozen": "o", "finetuned": "s"}
CORRECT, WRONG = "#007A5A", "#B3261E"
MOST = 30  # classes, or blocks, in one figure: the hardest, or the deepest
FONT = "DejaVu Sans"  # comes with matplotlib
# Usual fonts of Linux, Windows and macOS for characters that it lacks.
FALL_BACK = (
    "Noto Sans CJK JP", "Noto Sans", "WenQuanYi Zen Hei", "Microsoft YaHei", "Malgun Gothic",
    "Hiragino Sans GB", "Arial Unicode MS", "Segoe UI Emoji", "Unifont",
)  # fmt: skip
RENDERER = RendererAgg(1, 1, 1000)  # measures texts, in thousandths of an inch
PERCENT = ticker.FuncFormatter(lambda value, _: f"{100 * value:g}%")

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # some have no bold weight
installed = font_manager.get_font_names()
plt.rcdefaults()  # not what a matplotlibrc of this machine says
plt.rcParams.update(
    {
        "font.family": [FONT, *(name for name in FALL_BACK if name in installed)],
        "font.size": 11,
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "legend.frameon": False,
        "savefig.dpi": 110,
    }
)


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG that holds no date and no version: same figure, same bytes.

    Prints a line where it shows boxes, because no font has a character.
    """
    with replacing(path) as partial, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(
            partial, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None}
        )  # fmt: skip
    plt.close(figure)
    missing = sorted({str(w.message) for w in caught if "missing from" in str(w.message)})
    if missing:
        print(f"{path}: shows boxes for characters that no font has: {missing[0]}", flush=True)


def shortened(text: str, length: int) -> str:
    """`text` in at most `length` characters, at least one: its middle becomes "…"."""
    kept = max(length, 1) - 1
    left = kept // 2
    return text if len(text) <= length else f"{text[:left]}…{text[len(text) - kept + left :]}"


def fitting(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """`text`, its middle left out where it is wider than `inches` in this font."""
    font = font_manager.FontProperties(size=size, weight=weight)

    def width(length: int) -> float:
        line = shortened(text, length)
        return RENDERER.get_text_width_height_descent(line, font, False)[0] / 1000

    with warnings.catch_warnings(action="ignore"):  # `save` says what no font has
        return shortened(text, bisect.bisect_right(range(1, len(text) + 1), inches, key=width))


def image_grid(
    images: np.ndarray,
    names: Sequence[str],
    best: dict[str, list[tuple[str, float]]],
    sections: dict[str, np.ndarray],
    names_are_true: bool = False,
) -> Figure:
    """Images, uint8 (N, H, W, 3), eight in a row, each over its name and each mode's prediction.

    `best[mode]` holds for each image its most probable class and the probability; `sections` the
    indices of the images, int (n,), under each heading. Where the names are the true classes, a
    correct prediction has a tick and is green; a wrong one has a cross, is red and bold.
    """
    columns = max(1, min(8, max(map(len, sections.values()))))
    width = max(8.2, 1.72 * columns)  # in inches, as all lengths here
    heights = [2.28 * -(-len(numbers) // columns) + 0.8 for numbers in sections.values()]
    total = top = sum(heights)
    figure = plt.figure(figsize=(width, total), layout="none")
    what = "the true class" if names_are_true else "the file"
    for (heading, numbers), height in zip(sections.items(), heights, strict=True):
        for position, i in enumerate(numbers):
            left = 1.72 * (position % columns) + 0.1
            bottom = top - (0.7 + 2.28 * (position // columns) + 1.5)
            inches = np.array([left, bottom, 1.5, 1.5])
            axes = figure.add_axes(tuple(inches / (width, total, width, total)))
            axes.imshow(images[i], interpolation="bicubic")
            axes.set_axis_off()
            shown = {mode: best[mode][i] for mode in COLOURS}
            write_predictions(axes, names[i], shown, names_are_true)
        lines = list(COLOURS)
        if names_are_true:
            right = {mode: sum(best[mode][i][0] == names[i] for i in numbers) for mode in COLOURS}
            lines = [f"{mode} ({count} of {len(numbers)} right)" for mode, count in right.items()]
        note = f"Below each image: {what}; prediction and confidence of {'; of '.join(lines)}."
        x, y = 0.1 / width, (top - np.array([0.18, 0.45])) / total
        figure.text(x, y[0], heading, weight="bold", size=15, va="top")
        figure.text(x, y[1], note, size=10.5, va="top")
        top -= height
    return figure


def write_predictions(
    axes: Axes, name: str, best: dict[str, tuple[str, float]], name_is_true: bool
) -> None:
    """Below an image its name and, in lines of their own, what each mode predicts."""
    lines = [(fitting(name, 1.6, 10.5, "bold"), "black", "bold", 10.5)]
    for mode, colour in COLOURS.items():
        label, probability = best[mode]
        mark, weight = "", "normal"
        if name_is_true and label == name:
            mark, colour = "✓ ", CORRECT
        elif name_is_true:
            mark, colour, weight = "✗ ", WRONG, "bold"
        text = f"{mark}{fitting(label, 1.02, 9.5, weight)} {probability:.0%}"
        lines.append((text, colour, weight, 9.5))
    for number, (text, colour, weight, size) in enumerate(lines):
        axes.text(
            0, -0.06 - 0.13 * number, text, color=colour, weight=weight, size=size,
            transform=axes.transAxes, va="top",
        )  # fmt: skip


def movement(moved: dict[str, list]) -> Figure:
    """How far fine-tuning moved each `block`: its `weights`, and the `scale_and_shift` of its
    normalisation layers, as shares of their norm before; nan where there are none.
    """
    count = min(len(moved["block"]), MOST)  # the last, and the whole
    y = np.arange(count)
    figure, axes = plt.subplots(figsize=(8.5, 0.5 * count + 1.7), layout="constrained")
    labels = {
        "weights": "weights of the layers",
        "scale_and_shift": "scale and shift of normalisation",
    }
    places, greys = (-0.2, 0.2), ("0.3", "0.65")
    for place, (kind, label), colour in zip(places, labels.items(), greys, strict=True):
        values = np.array(moved[kind][-count:])
        axes.barh(y + place, values, 0.38, color=colour, label=label)
        for position, value in zip(y + place, values, strict=True):
            text = "none" if np.isnan(value) else f"{100 * value:.1f} %"
            axes.annotate(
                text, (np.nan_to_num(value), position), (4, 0), textcoords="offset points",
                va="center", size=9,
            )  # fmt: skip
    axes.set_yticks(y, [fitting(name, 2.2, 11) for name in moved["block"][-count:]])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("norm of the change, relative to the norm before fine-tuning")
    axes.set_title("How far fine-tuning moved each block")
    axes.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def learning_curves(curves: dict[str, dict[str, list[float]]]) -> Figure:
    """Accuracy and loss after each epoch; `curves[mode]` has train_… and validation_… values."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    titles = ("Accuracy", "Loss (nats; training: smoothed labels)")
    for axes, name, title in zip(panels, ("accuracy", "loss"), titles, strict=True):
        for mode, values in curves.items():
            for part, style in (("validation", "-"), ("train", ":")):
                y = values[f"{part}_{name}"]
                marker = MARKERS[mode] if part == "validation" else None
                seen = "validation" if part == "validation" else "training (augmented)"
                axes.plot(
                    np.arange(1, len(y) + 1), y, style, color=COLOURS[mode], marker=marker,
                    markersize=4, label=f"{mode}, {seen}",
                )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("epoch (finetuned: the images grow until the last epoch)")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    panels[0].yaxis.set_major_formatter(PERCENT)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def hardest(matrices: dict[str, np.ndarray]) -> np.ndarray:
    """The indices, in order, of the MOST classes with the lowest mean recall of both modes."""
    recall = sum(counts.diagonal() / counts.sum(1) for counts in matrices.values())
    return np.sort(np.argsort(recall, kind="stable")[:MOST])


def confusion(matrices: dict[str, np.ndarray], classes: list[str]) -> Figure:
    """Both confusion matrices, int (classes, classes), true classes in rows, as % of each row.

    Of many classes, the hardest; a last column then counts the predictions of all others.
    """
    shown = hardest(matrices)
    labels = [fitting(classes[i], 1.6, 11) for i in shown]
    others = ["others"] if len(shown) < len(classes) else []
    size = max(4.2, 0.42 * len(labels) + 1.6)
    figure, panels = plt.subplots(
        1, len(matrices), figsize=(2 * size + 0.6, size + 0.5), layout="constrained", sharey=True
    )
    for axes, (mode, counts) in zip(panels, matrices.items(), strict=True):
        share = 100 * counts[shown] / counts[shown].sum(1, keepdims=True)
        inside = share[:, shown]
        if others:
            inside = np.column_stack([inside, share.sum(1) - inside.sum(1)])
        axes.imshow(inside, cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(inside):
            axes.text(
                column, row, str(int(value + 0.5) or "·"), ha="center", va="center",
                size=9, color="white" if value > 55 else "black",
            )  # fmt: skip
        columns = labels + others
        axes.set_xticks(
            range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor"
        )
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title(f"{mode}: accuracy {np.trace(counts) / counts.sum():.2%}")
        axes.set_xlabel("predicted class")
    panels[0].set_ylabel("true class")
    which = f", the {len(shown)} hardest of {len(classes):,} classes" if others else ""
    figure.suptitle(
        f"Confusion matrix: % of the images of each true class{which}", x=0.01, ha="left"
    )
    return figure


def per_class(matrices: dict[str, np.ndarray], classes: list[str]) -> Figure:
    """The accuracy on each class (its recall) in both modes, the hardest class at the bottom."""
    shown = hardest(matrices)
    recall = {mode: (m.diagonal() / m.sum(1))[shown] for mode, m in matrices.items()}
    order = np.argsort(recall["frozen"], kind="stable")
    y = np.arange(len(shown))
    figure, axes = plt.subplots(figsize=(8.5, 0.42 * len(shown) + 1.6), layout="constrained")
    frozen, finetuned = (recall[mode][order] for mode in ("frozen", "finetuned"))
    axes.hlines(y, frozen, finetuned, color="0.75", linewidth=3, zorder=1)
    for mode, marker in MARKERS.items():
        values = recall[mode][order]
        axes.scatter(values, y, 70, COLOURS[mode], marker=marker, label=mode, zorder=2)
    for position, before, after in zip(y, frozen, finetuned, strict=True):
        axes.annotate(
            f"{100 * (after - before):+.1f}".replace("-", "\N{MINUS SIGN}"),
            (max(before, after), position), (9, 0),
            textcoords="offset points", va="center", size=10,
        )  # fmt: skip
    axes.set_yticks(y, [fitting(classes[i], 2.2, 11) for i in shown[order]])
    axes.xaxis.set_major_locator(ticker.MaxNLocator(steps=[1, 2, 5, 10]))  # whole per cents
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("accuracy on the class's test images")
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.25)
    which = "" if len(shown) == len(classes) else f", the {len(shown)} hardest of {len(classes):,}"
    axes.set_title(f"Accuracy per class{which}; gain of fine-tuning in points")
    axes.legend(loc="lower right")
    return figure


def label_accuracy(axes: Axes, title: str, x_label: str) -> None:
    """Title and axes of lines of accuracy on the test set."""
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel("accuracy on the test set")
    axes.yaxis.set_major_formatter(PERCENT)
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
