"""Every figure, in the colours of Okabe and Ito, which the colour-blind tell apart."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# A notebook sets MPLBACKEND for all that it starts; matplotlib fails where it cannot import that.
os.environ["MPLBACKEND"] = "Agg"
from matplotlib import font_manager, ticker
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"frozen": "#0072B2", "finetuned": "#D55E00"}
MARKERS = {"frozen": "o", "finetuned": "s"}
CORRECT, WRONG = "#007A5A", "#B3261E"
MAX_SHOWN = 30  # classes, or blocks, in one figure: the hardest, or the deepest
# The first comes with matplotlib; the others have more characters, where they are installed.
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Microsoft YaHei", "Arial Unicode MS")
PERCENT = ticker.FuncFormatter(lambda value, _: f"{100 * value:g} %")

plt.rcdefaults()  # not what a matplotlibrc of this machine says
plt.rcParams.update(
    {
        "font.family": [font for font in FONTS if font in font_manager.get_font_names()],
        "font.size": 11,
        "text.parse_math": False,  # names of classes may hold dollar signs
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "legend.frameon": False,
        "savefig.dpi": 110,
    }
)


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG that holds no date and no version: same figure, same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})
    plt.close(figure)


def fit_text(text: str, length: int) -> str:
    """`text` in at most `length` characters, three or more: its middle becomes "…"."""
    left, right = length // 2, length - length // 2 - 1
    return text if len(text) <= length else f"{text[:left]}…{text[-right:]}"


def image_grid(
    images: np.ndarray,
    names: Sequence[str],
    best: dict[str, list[tuple[str, float]]],
    sections: dict[str, np.ndarray],
    names_are_true: bool = False,
) -> Figure:
    """Images, uint8 (N, H, W, 3), eight in a row, each above its name and each mode's prediction.

    `best[mode]` holds for each image its most probable class and the probability; `sections` the
    indices of the images, int (n,), under each heading. If the names are the true classes, a
    correct prediction is green with a tick; a wrong one is red, bold, with a cross.
    """
    columns = max(1, min(8, max(map(len, sections.values()))))
    width = max(8.2, 1.72 * columns)  # in inches, as all lengths here
    heights = [2.28 * -(-len(index) // columns) + 0.8 for index in sections.values()]
    total = top = sum(heights)
    figure = plt.figure(figsize=(width, total), layout="none")
    for (heading, index), height in zip(sections.items(), heights, strict=True):
        for position, i in enumerate(index):
            left = 1.72 * (position % columns) + 0.1
            bottom = top - (0.7 + 2.28 * (position // columns) + 1.5)
            inches = np.array([left, bottom, 1.5, 1.5])
            axes = figure.add_axes(tuple(inches / (width, total, width, total)))
            axes.imshow(images[i], interpolation="bicubic")
            axes.set_axis_off()
            write_predictions(axes, names[i], {m: best[m][i] for m in COLOURS}, names_are_true)
        lines = list(COLOURS)
        if names_are_true:
            correct = {mode: sum(best[mode][i][0] == names[i] for i in index) for mode in COLOURS}
            lines = [f"{mode} ({count} of {len(index)} correct)" for mode, count in correct.items()]
        what = "the true class" if names_are_true else "the file"
        note = f"Below each image: {what}; prediction and confidence of {'; of '.join(lines)}."
        x, y = 0.1 / width, (top - np.array([0.18, 0.45])) / total
        figure.text(x, y[0], heading, weight="bold", size=15, va="top")
        figure.text(x, y[1], note, size=10.5, va="top")
        top -= height
    return figure


def write_predictions(
    axes: Axes, name: str, best: dict[str, tuple[str, float]], name_is_true: bool
) -> None:
    """Below an image its name and, in a line for each mode, the prediction and its confidence."""
    lines = [(fit_text(name, 17), "black", "bold", 10.5)]
    for mode, colour in COLOURS.items():
        label, probability = best[mode]
        mark, weight = "", "normal"
        if name_is_true:
            correct = label == name
            mark, colour = ("✓ ", CORRECT) if correct else ("✗ ", WRONG)
            weight = "normal" if correct else "bold"
        lines.append((f"{mark}{fit_text(label, 11)} {probability:.0%}", colour, weight, 9.5))
    for number, (text, colour, weight, size) in enumerate(lines):
        axes.text(
            0, -0.06 - 0.13 * number, text, color=colour, weight=weight, size=size,
            transform=axes.transAxes, va="top",
        )  # fmt: skip


def movement(rows: list[dict[str, str]]) -> Figure:
    """How far fine-tuning moved the weights of each block (the rows of metrics/movement.csv)."""
    rows = rows[-MAX_SHOWN:]  # the last, and the whole
    moved = [float(row["moved"]) for row in rows]
    figure, axes = plt.subplots(figsize=(8.5, 0.4 * len(rows) + 1.5), layout="constrained")
    bars = axes.barh([fit_text(row["block"], 24) for row in rows], moved, color="0.4")
    axes.bar_label(bars, [f"{100 * value:.1f} %" for value in moved], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("norm of the change of the weights, relative to their norm before")
    axes.set_title("How far fine-tuning moved each block")
    axes.grid(axis="x", alpha=0.25)
    return figure


def learning_curves(curves: dict[str, list[dict[str, str]]]) -> Figure:
    """Accuracy and loss after each epoch; `curves[mode]` are the rows of metrics/curves/."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    titles = ("Accuracy", "Loss (nats; training: smoothed labels)")
    for axes, name, title in zip(panels, ("accuracy", "loss"), titles, strict=True):
        for mode, rows in curves.items():
            for part, style, seen in (
                ("validation", "-", "validation"), ("train", ":", "training (augmented)")
            ):  # fmt: skip
                axes.plot(
                    range(1, len(rows) + 1), [float(row[f"{part}_{name}"]) for row in rows], style,
                    color=COLOURS[mode], marker=MARKERS[mode] if style == "-" else None,
                    markersize=4, label=f"{mode}, {seen}",
                )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("epoch (finetuned: the images grow until the last epoch)")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    panels[0].yaxis.set_major_formatter(PERCENT)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def hardest_classes(matrices: dict[str, np.ndarray]) -> np.ndarray:
    """The indices, in order, of the MAX_SHOWN classes with the lowest mean recall of both modes."""
    recall = sum(counts.diagonal() / counts.sum(1) for counts in matrices.values())
    return np.sort(np.argsort(recall, kind="stable")[:MAX_SHOWN])


def confusion(matrices: dict[str, np.ndarray], classes: list[str]) -> Figure:
    """Both confusion matrices, int (classes, classes), true classes in rows, as % of each row.

    Of many classes, the hardest; a last column then counts the predictions of all others.
    """
    shown = hardest_classes(matrices)
    labels = [fit_text(classes[i], 17) for i in shown]
    columns = labels + (["others"] if len(shown) < len(classes) else [])
    size = max(4.2, 0.42 * len(labels) + 1.6)
    figure, panels = plt.subplots(
        1, len(matrices), figsize=(2 * size + 0.6, size + 0.5), layout="constrained", sharey=True
    )
    for axes, (mode, counts) in zip(panels, matrices.items(), strict=True):
        share = 100 * counts[shown] / counts[shown].sum(1, keepdims=True)
        inside = np.column_stack([share[:, shown], 100 - share[:, shown].sum(1)])[:, : len(columns)]
        axes.imshow(inside, cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(inside):
            axes.text(
                column, row, str(int(value + 0.5) or "·"), ha="center", va="center",
                size=9, color="white" if value > 55 else "black",
            )  # fmt: skip
        axes.set_xticks(
            range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor"
        )
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title(f"{mode}: accuracy {100 * np.trace(counts) / counts.sum():.2f} %")
        axes.set_xlabel("predicted class")
    panels[0].set_ylabel("true class")
    which = f", the {len(shown)} hardest of {len(classes):,} classes" if columns != labels else ""
    figure.suptitle(
        f"Confusion matrix: % of the images of each true class{which}", x=0.01, ha="left"
    )
    return figure


def per_class(matrices: dict[str, np.ndarray], classes: list[str]) -> Figure:
    """The accuracy on each class (its recall) in both modes, the hardest class at the bottom."""
    shown = hardest_classes(matrices)
    recall = {mode: (m.diagonal() / m.sum(1))[shown] for mode, m in matrices.items()}
    order = np.argsort(recall["frozen"], kind="stable")
    y = np.arange(len(shown))
    figure, axes = plt.subplots(figsize=(8.5, 0.42 * len(shown) + 1.6), layout="constrained")
    frozen, finetuned = (recall[mode][order] for mode in COLOURS)
    axes.hlines(y, frozen, finetuned, color="0.75", linewidth=3, zorder=1)
    for mode, marker in MARKERS.items():
        values = recall[mode][order]
        axes.scatter(values, y, 70, COLOURS[mode], marker=marker, label=mode, zorder=2)
    for position, before, after in zip(y, frozen, finetuned, strict=True):
        axes.annotate(
            f"{100 * (after - before):+.1f}", (max(before, after), position), (9, 0),
            textcoords="offset points", va="center", size=10,
        )  # fmt: skip
    axes.set_yticks(y, [fit_text(classes[i], 24) for i in shown[order]])
    axes.xaxis.set_major_locator(ticker.MaxNLocator(steps=[1, 2, 5, 10]))  # whole per cents
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_xlabel("accuracy on the test images of the class")
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.25)
    which = "" if len(shown) == len(classes) else f", the {len(shown)} hardest of {len(classes):,}"
    axes.set_title(f"Accuracy per class{which}; gain of fine-tuning in percentage points")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
