"""Every picture of the project, in Okabe and Ito's colours, which the colour-blind tell apart."""

from pathlib import Path

import matplotlib
import numpy as np

from transfer.files import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"frozen": "#0072B2", "finetuned": "#D55E00"}
RIGHT, WRONG = "#007A5A", "#B3261E"
plt.rcParams.update(
    {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "legend.frameon": False,
        "savefig.dpi": 110,
    }
)


def save(figure: plt.Figure, path: Path) -> None:
    """Write `figure` as a PNG that holds no date and no version: same picture, same bytes."""
    with replacing(path) as partial:
        figure.savefig(partial, metadata={"Software": None})
    plt.close(figure)


def first_batch(images: np.ndarray, predictions: dict[str, list], classes: list[str]) -> plt.Figure:
    """Pictures, uint8 (N, H, W, 3), each over its true class and what each mode said, how surely.

    `predictions` holds N class numbers as "actual", and for each mode as MODE, and N confidences
    as MODE_confidence. A right answer has a tick and is green; a wrong one has a cross, is red
    and bold.
    """
    modes = list(COLOURS)
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = plt.figure(figsize=(1.72 * columns, 2.28 * rows + 0.8), layout="none")
    width, height = figure.get_size_inches()
    for i, image in enumerate(images):
        row = {name: values[i] for name, values in predictions.items()}
        left = (i % columns + 0.06) / columns
        bottom = 1 - (0.7 + 2.28 * (i // columns) + 1.5) / height
        axes = figure.add_axes((left, bottom, 1.5 / width, 1.5 / height))
        axes.imshow(image, interpolation="bicubic")
        axes.set_axis_off()
        lines = [(classes[row["actual"]], "black", "bold", 10.5)]
        for mode in modes:
            right = row[mode] == row["actual"]
            text = f"{'✓' if right else '✗'} {classes[row[mode]]} {row[mode + '_confidence']:.0%}"
            lines.append((text, RIGHT if right else WRONG, "normal" if right else "bold", 9.5))
        for line, (text, colour, weight, size) in enumerate(lines):
            axes.text(
                0, -0.06 - 0.13 * line, text, color=colour, weight=weight, size=size,
                transform=axes.transAxes, va="top",
            )  # fmt: skip
    figure.text(
        0.06 / columns, 1 - 0.18 / height, "The first test batch", weight="bold", size=15, va="top"
    )
    figure.text(
        0.06 / columns, 1 - 0.45 / height,
        f"Bold: the true class. Below it, what each model says: first {modes[0]}, then {modes[1]};"
        " ✓ right, ✗ wrong, and how sure it is.",
        size=10.5, va="top",
    )  # fmt: skip
    return figure


def learning_curves(curves: dict[str, dict[str, list[float]]]) -> plt.Figure:
    """Accuracy and loss after each epoch; `curves[mode]` has train_… and validation_… values."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    titles = ("Accuracy", "Loss (nats; in training with smoothed labels)")
    for axes, name, title in zip(panels, ("accuracy", "loss"), titles, strict=True):
        for mode, values in curves.items():
            for part, style in (("validation", "-"), ("train", ":")):
                y = values[f"{part}_{name}"]
                marker = "os"[list(curves).index(mode)] if part == "validation" else None
                seen = "held out" if part == "validation" else "training (augmented)"
                axes.plot(
                    np.arange(1, len(y) + 1), y, style, color=COLOURS[mode], marker=marker,
                    markersize=4, label=f"{mode}, {seen}",
                )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
    panels[0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def confusion(matrices: dict[str, np.ndarray], classes: list[str]) -> plt.Figure:
    """Both confusion matrices, int (classes, classes), true classes in rows, as % of each row."""
    size = max(4.2, 0.56 * len(classes) + 1)
    figure, panels = plt.subplots(
        1, len(matrices), figsize=(2 * size + 0.6, size + 0.3), layout="constrained", sharey=True
    )
    ticks = np.arange(len(classes))
    for axes, (mode, counts) in zip(panels, matrices.items(), strict=True):
        share = 100 * counts / counts.sum(1, keepdims=True)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(share):
            axes.text(
                column, row, f"{value:.0f}" if value >= 0.5 else "·", ha="center", va="center",
                size=9, color="white" if value > 55 else "black",
            )  # fmt: skip
        axes.set_xticks(ticks, classes, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, classes)
        axes.set_title(f"{mode}: {np.trace(counts) / counts.sum():.2%} right")
        axes.set_xlabel("predicted")
    panels[0].set_ylabel("true class")
    figure.suptitle(
        "Of 100 pictures of each class, how many were taken for which?", x=0.01, ha="left"
    )
    return figure


def per_class(accuracy: dict[str, np.ndarray], classes: list[str]) -> plt.Figure:
    """Each class's accuracy in both modes, float (classes,), hardest class at the bottom."""
    order = np.argsort(accuracy["frozen"])
    y = np.arange(len(classes))
    figure, axes = plt.subplots(figsize=(8.5, 0.42 * len(classes) + 1.6), layout="constrained")
    frozen, finetuned = (accuracy[mode][order] for mode in ("frozen", "finetuned"))
    axes.hlines(y, frozen, finetuned, color="0.75", linewidth=3, zorder=1)
    for mode, marker in (("frozen", "o"), ("finetuned", "s")):
        axes.scatter(
            accuracy[mode][order], y, 70, COLOURS[mode], marker=marker, label=mode, zorder=2
        )
    for position, before, after in zip(y, frozen, finetuned, strict=True):
        axes.annotate(
            f"{100 * (after - before):+.1f}", (max(before, after), position), (9, 0),
            textcoords="offset points", va="center", size=10,
        )  # fmt: skip
    axes.set_yticks(y, np.array(classes)[order])
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title("Accuracy on each class, and what fine-tuning changes (points)")
    axes.legend(loc="lower right")
    return figure


def answers(
    images: np.ndarray, names: list[str], top: dict[str, list[list[tuple[str, float]]]]
) -> plt.Figure:
    """Pictures, uint8 (N, H, W, 3), each under its name and beside what each mode takes it for.

    `top[mode]` holds for each picture its likeliest classes and their probabilities, in order.
    """
    width, header, row = 10, 1.15, 1.8  # in inches, as all lengths here
    height = header + row * len(images)
    figure = plt.figure(figsize=(width, height), layout="none")

    def write(text: str, left: float, down: float, **style) -> None:
        # A name may hold dollar signs, which would stand for mathematics.
        figure.text(left / width, 1 - down / height, text, va="top", parse_math=False, **style)

    def panel(left: float, down: float, wide: float, high: float) -> plt.Axes:
        return figure.add_axes(
            (left / width, 1 - (down + high) / height, wide / width, high / height)
        )

    lefts = {mode: 3.2 + 4.2 * number for number, mode in enumerate(top)}  # of the bars
    write("What both models say", 0.15, 0.15, weight="bold", size=15)
    size = images.shape[1]
    write(
        f"Each picture as they see it: its middle square, {size} pixels a side.",
        0.15,
        0.47,
        size=10.5,
    )
    for mode, left in lefts.items():
        write(mode, left, 0.82, weight="bold", size=12, color=COLOURS[mode])
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        down = header + row * i
        write(shortened(name, 90), 0.15, down, weight="bold", size=10.5)
        axes = panel(0.15, down + 0.25, 1.35, 1.35)
        axes.imshow(image, interpolation="bicubic")
        axes.set_axis_off()
        for mode, left in lefts.items():
            classes, probabilities = zip(*top[mode][i], strict=True)
            axes = panel(left, down + 0.25, 1.8, 1.35)
            y = range(len(classes))
            whole = axes.barh(y, 1, 0.5, color="0.93")
            axes.barh(y, probabilities, 0.5, color=COLOURS[mode])
            axes.bar_label(whole, [f"{p:.1%}" for p in probabilities], padding=4, size=10)
            labels = [shortened(label, 16) for label in classes]
            axes.set_yticks(y, labels, size=10, parse_math=False)
            axes.tick_params(length=0)
            axes.set(xlim=(0, 1), ylim=(len(classes) - 0.5, -0.5), xticks=[])
            axes.spines[:].set_visible(False)
    return figure


def shortened(text: str, length: int) -> str:
    """`text`, its middle left out where it is longer than `length`."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}…{text[half + 1 - length :]}"


def accuracy_by_blocks(blocks: list[int], accuracy: dict[str, list[float]]) -> plt.Figure:
    """Each mode's accuracy against how many blocks of the backbone are kept."""
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    for (mode, values), marker in zip(accuracy.items(), "os", strict=True):
        axes.plot(blocks, values, color=COLOURS[mode], marker=marker, label=mode)
        for x, y in zip(blocks, values, strict=True):
            above = mode == "finetuned"
            axes.annotate(
                f"{100 * y:.0f}", (x, y), (0, 7 if above else -7), textcoords="offset points",
                ha="center", va="bottom" if above else "top", size=9, color=COLOURS[mode],
            )  # fmt: skip
    axes.set_title("What fine-tuning adds depends on where the network is cut")
    axes.set_xlabel("pretrained blocks kept")
    axes.set_ylabel("accuracy on the test set")
    axes.set_xticks(blocks)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    return figure
