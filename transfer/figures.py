"""Every figure, in the colours of Okabe and Ito, which the colour-blind tell apart."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# A notebook sets MPLBACKEND for its child processes. Without that backend, matplotlib would fail.
os.environ["MPLBACKEND"] = "Agg"
from matplotlib import font_manager, ticker
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

COLOURS = {"frozen": "#0072B2", "finetuned": "#D55E00"}
MARKERS = {"frozen": "o", "finetuned": "s"}
CORRECT, WRONG = "#007A5A", "#B3261E"
MAX_SHOWN = 30  # classes (the hardest ones) or blocks (the deepest ones) in one figure
# The first comes with matplotlib; the others have more characters, where they are installed.
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Microsoft YaHei", "Arial Unicode MS")
BETTER = LinearSegmentedColormap.from_list(
    "better", [COLOURS["finetuned"], "white", COLOURS["frozen"]]
)
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
        "savefig.dpi": 200,
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
    columns = max(4, min(8, max(map(len, sections.values()))))
    margin, step, high = 1, 1.64, 2.25  # in inches, as all lengths here
    width = margin + step * columns
    heights = [high * -(-len(index) // columns) + 0.8 for index in sections.values()]
    total = top = sum(heights)
    figure = plt.figure(figsize=(width, total), layout="none")
    for (heading, index), height in zip(sections.items(), heights, strict=True):
        figure.text(0.1 / width, (top - 0.18) / total, heading, weight="bold", size=17, va="top")
        for position, i in enumerate(index):
            left = margin + step * (position % columns)
            bottom = top - (0.6 + high * (position // columns) + 1.44)
            inches = np.array([left, bottom, 1.44, 1.44])
            axes = figure.add_axes(tuple(inches / (width, total, width, total)))
            axes.imshow(images[i], interpolation="nearest")
            axes.set_axis_off()
            lines = [("class" if names_are_true else "file", fit_text(names[i], 16), "black", True)]
            for mode, colour in COLOURS.items():
                label, share = best[mode][i]
                text = f"{fit_text(label, 10)}, {percent(share)}"
                wrong = names_are_true and label != names[i]
                if names_are_true:
                    colour, text = (WRONG, f"✗ {text}") if wrong else (CORRECT, f"✓ {text}")
                lines.append((mode, text, colour, wrong))
            for line, (row, text, colour, bold) in enumerate(lines):
                style: dict[str, Any] = {"va": "top", "transform": axes.transAxes}
                y, weight = -0.06 - 0.15 * line, "bold" if bold else "normal"
                axes.text(0, y, text, size=9.5, color=colour, weight=weight, **style)
                if position % columns == 0:  # what the line is, once in each row of images
                    axes.text(-0.08, y, row, size=9.5, color="0.35", ha="right", **style)
        top -= height
    return figure


def percent(share: float) -> str:
    """Without decimals, and never rounded to certainty."""
    return f"{100 * share:.0f} %" if share < 0.995 else ">99 %"


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
    axes.set_title(f"Fine-tuning changed the backbone's weights by {100 * moved[-1]:.1f} %")
    axes.grid(axis="x", alpha=0.25)
    return figure


def learning_curves(curves: dict[str, list[dict[str, str]]]) -> Figure:
    """Accuracy after each epoch of both modes; `curves[mode]` are the rows of metrics/curves/."""
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    ticks: list[str] = []
    final = []
    for mode, rows in curves.items():
        x = np.arange(len(rows)) + len(ticks)
        for part, style, marker in (("train", ":", ""), ("validation", "-", MARKERS[mode])):
            y = [float(row[f"{part}_accuracy"]) for row in rows]
            name = "training (augmented images)" if part == "train" else "validation"
            axes.plot(x, y, style, color=COLOURS[mode], marker=marker, label=f"{mode}, {name}")
        final.append(f"{100 * y[-1]:.1f} % {mode}")
        if ticks:
            axes.axvline(x[0] - 0.5, color="0.5", linestyle="--", linewidth=1)
            where = axes.get_xaxis_transform()
            axes.text(x[0] - 0.4, 0.02, "the backbone learns too", color="0.35", transform=where)
        ticks += [row["epoch"] for row in rows]
    step = -(-len(ticks) // 30)
    axes.set_xticks(range(0, len(ticks), step), ticks[::step])
    axes.set_xlabel("epoch of each phase")
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_title(f"Validation accuracy at the end: {', '.join(final)}")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def hardest(recall: np.ndarray) -> np.ndarray:
    """The indices, in order, of the MAX_SHOWN classes with the lowest `recall`, float (n,)."""
    return np.sort(np.argsort(recall, kind="stable")[:MAX_SHOWN])


def confusion(matrices: Sequence[np.ndarray], classes: list[str]) -> Figure:
    """The fine-tuned model's confusion matrix, true classes in rows, and how it differs from the
    frozen model's. Of more than MAX_SHOWN classes, the hardest are shown.

    `matrices` are both models' counts, int (classes, classes), frozen first.
    """
    frozen, finetuned = matrices
    recall = (frozen + finetuned).diagonal() / (frozen + finetuned).sum(1)
    shown = hardest(recall)
    labels = [fit_text(classes[i], 17) for i in shown]
    size = max(4.2, 0.46 * len(labels) + 1.6)
    figure, panels = plt.subplots(
        1, 2, figsize=(2 * size + 0.6, size + 0.5), layout="constrained", sharey=True
    )
    inside = np.ix_(shown, shown)
    diagonal, images = np.eye(len(shown), dtype=bool), finetuned[shown].sum(1, keepdims=True)
    change = (finetuned - frozen)[inside]
    better = np.where(diagonal, change, -change) / images  # more of what is correct, less of errors
    errors = np.where(diagonal, 0, finetuned[inside]) / images
    row, column = np.unravel_index(errors.argmax(), errors.shape)
    worst = f"finetuned: most often {labels[row]} is taken for {labels[column]}"
    drawn = [
        (finetuned[inside], errors, "Blues", 0, worst),
        (change, better, BETTER, -1, "finetuned minus frozen (blue: better, orange: worse)"),
    ]
    for axes, (counts, colours, cmap, low, title) in zip(panels, drawn, strict=True):
        high = max(abs(colours).max(), 1e-9)
        axes.imshow(colours, cmap=cmap, vmin=low * high, vmax=high)
        for (row, column), value in np.ndenumerate(counts):
            text = f"{value:+d}" if low and value else str(value or "·")
            dark = abs(colours[row, column]) > 0.6 * high
            axes.text(column, row, text, ha="center", va="center", size=9,
                      color="white" if dark else "black",
                      weight="bold" if row == column else "normal")  # fmt: skip
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title(title)
        axes.set_xlabel("predicted class")
    panels[0].set_ylabel("true class")
    if len(shown) < len(classes):
        which = f"The {len(shown)} hardest of {len(classes):,} classes"
        figure.suptitle(which, x=0.01, ha="left")
    return figure


def per_class(rows: list[dict[str, str]]) -> Figure:
    """The accuracy on each class (its recall) in both modes, the hardest class at the bottom.

    `rows` are those of metrics/per_class.csv. Of more than MAX_SHOWN, the hardest are shown.
    """
    recalls = np.array([[float(row[f"{mode}_recall"]) for mode in COLOURS] for row in rows])
    shown = hardest(recalls.mean(1))
    shown = shown[np.argsort(recalls[shown, 0], kind="stable")]
    y = np.arange(len(shown))
    figure, axes = plt.subplots(figsize=(8.5, 0.42 * len(shown) + 1.8), layout="constrained")
    axes.hlines(y, *recalls[shown].T, color="0.75", linewidth=3, zorder=1)
    for values, mode in zip(recalls[shown].T, COLOURS, strict=True):
        axes.scatter(values, y, 70, COLOURS[mode], marker=MARKERS[mode], label=mode, zorder=2)
    clear = [float(rows[i]["mcnemar_p"]) < 0.05 for i in shown]
    for place, (before, after), sure in zip(y, recalls[shown], clear, strict=True):
        axes.annotate(
            f"{100 * (after - before) + 0:+.1f}{' *' if sure else ''}", (max(before, after), place),
            (9, 0), textcoords="offset points", va="center", weight="bold" if sure else "normal",
        )  # fmt: skip
    axes.set_yticks(y, [fit_text(rows[i]["class"], 24) for i in shown])
    axes.xaxis.set_major_locator(ticker.MaxNLocator(steps=[1, 2, 5, 10]))  # whole per cents
    axes.xaxis.set_major_formatter(PERCENT)
    axes.set_xlabel(
        "accuracy on the test images of the class; gain in percentage points\n"
        "* clear change of this class (McNemar's test, p < 0.05)"
    )
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.25)
    gains = recalls[:, 1] > recalls[:, 0]
    which = f" (the {len(shown)} hardest are shown)" if len(shown) < len(rows) else ""
    axes.set_title(f"Fine-tuning helps {gains.sum():,} of {len(rows):,} classes{which}")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
