"""What the speed claims rest on: `make bench`, after `make repro`. About an hour on 2 cores.

Measures side by side in one run, nothing else running meanwhile: the training images per second of
the pipeline and of what people usually write (benchmarks/peers.py), with the same network, image
size and batch size; the accuracy on the test set that each has reached after the same minutes; and
the pipeline's fine-tuning step with and without data work, on other thread counts, with other CPU
instructions, and against the fastest that these cores multiply. Prints tables and writes
benchmarks/results.json and docs/minutes.png.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks.peers import BACKBONE, PEERS, new_network
from transfer import figures
from transfer.common.dataset import load_classes, load_split, stratified
from transfer.common.errors import InputError, exit_cleanly
from transfer.common.files import write_json
from transfer.common.paths import COST, PREPARED
from transfer.common.run import machine
from transfer.common.settings import MODES, load_params, merge
from transfer.inference import predict, set_up_torch
from transfer.model import Network, measure_blocks
from transfer.training.loop import train, train_one_epoch
from transfer.training.modes import make_mode
from transfer.training.optimizer import Updates

RESULTS, FIGURE = Path("benchmarks/results.json"), Path("docs/minutes.png")
REPEATS, SAMPLE = 3, 3200  # turns; images in each
MINUTES = (2, 6)  # of fine-tuning
CONTENDERS = ("#56B4E9", "#009E73", "#CC79A7", "#D55E00")  # colours, the pipeline's last
WARM_UP, STEPS, ROUNDS = 3, 10, 3
# So that CPUs with more than AVX2 compute as those without, by torch, oneDNN and MKL.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}
VARIANTS: dict[str, tuple[int, dict[str, str]]] = {
    "2 threads": (2, {}), "1 thread": (1, {}), "4 threads": (4, {}), "2 threads, AVX2": (2, AVX2),
}  # fmt: skip


def rate(contender: str, mode: str) -> dict[str, float]:
    """Training images per second, without the start.

    The pipeline's are those of whole trainings on fewer images: in mode frozen with the feature
    extraction, in mode finetuned of an epoch before and one after BatchNorm's statistics are fixed.
    """
    params = load_params()
    device = set_up_torch("cpu", params.train.threads)
    if contender in PEERS:
        times: list[float] = []
        steps = SAMPLE // params.train.shared.batch_size
        PEERS[contender](mode, steps, lambda: times.append(time.perf_counter()))
        seconds = (times[-1] - times[WARM_UP - 1]) / (len(times) - WARM_UP)
        return {"images_per_s": params.train.shared.batch_size / seconds}
    epochs = params.train.frozen.epochs if mode == "frozen" else 2
    equal = {"shared": {"min_steps": 1}, "finetuned": {"initial_scale": 1.0}}
    params = params.changed({"train": merge(equal, {mode: {"epochs": epochs}})})
    split = load_split(PREPARED, "train", load_classes(PREPARED)).take(torch.arange(SAMPLE))
    two = split.take(torch.arange(2))  # images to validate on: not to be timed
    network = new_network(mode)
    start = time.perf_counter()
    train(make_mode(mode, network, split, params, device), two, lambda *_: None)
    return {"images_per_s": SAMPLE * epochs / (time.perf_counter() - start)}


def reached(contender: str, amount: str) -> dict[str, float]:
    """Minutes of fine-tuning and the accuracy on the test set then.

    `amount` is how many epochs of the pipeline, or steps of a peer, should take the minutes.
    """
    params = load_params()
    device = set_up_torch("cpu", params.train.threads)
    start = time.perf_counter()
    if contender in PEERS:
        network = PEERS[contender]("finetuned", int(amount), lambda: None)
    else:
        network = fine_tuned(int(amount), device)
    minutes = (time.perf_counter() - start) / 60
    images, labels = load_split(PREPARED, "test", load_classes(PREPARED))
    predicted = predict(network, images, params.model.image_size).argmax(1)
    return {"minutes": minutes, "accuracy": (predicted == labels).double().mean().item()}


def fine_tuned(epochs: int, device: torch.device) -> Network:
    """As the stage trains, validation included."""
    params = load_params().changed({"train": {"finetuned": {"epochs": epochs}}})
    classes = load_classes(PREPARED)
    data = load_split(PREPARED, "train", classes)
    share = params.train.shared.validation_share
    rest, drawn = stratified(data.labels, share, classes, params.seed, "validation_share")
    network = new_network("finetuned")
    mode = make_mode("finetuned", network, data.take(rest), params, device)
    train(mode, data.take(drawn), lambda *_: None)
    return network


def amounts(rates: dict[str, float]) -> dict[str, list[int]]:
    """How many epochs (the pipeline) or steps (the peers) take the MINUTES, as it was measured."""
    params = load_params()
    cost = json.loads(COST.read_text(encoding="utf-8"))["train@finetuned"]["seconds"]
    seconds = {name: params.train.shared.batch_size / rate for name, rate in rates.items()}
    seconds["pipeline"] = cost / params.train.finetuned.epochs
    return {name: [round(60 * m / each) for m in MINUTES] for name, each in seconds.items()}


def step(threads: str) -> dict[str, float]:
    """Fine-tuning steps, in turns on augmented images and on one batch kept in memory."""
    params = load_params()
    device = set_up_torch("cpu", int(threads))
    network = new_network("finetuned")
    data = load_split(PREPARED, "train", load_classes(PREPARED))
    mode = make_mode("finetuned", network, data, params, device)
    steps = 2 * STEPS * (ROUNDS + 1)
    updates = Updates(network, mode.learning_rates, params.train.shared, steps)
    batches = iter(mode.batches(params.train.finetuned.epochs - 1))  # at full size
    kept = next(batches)
    seconds: dict[str, list[float]] = {"augmented": [], "in memory": []}
    for _ in range(ROUNDS + 1):
        sources = (itertools.islice(batches, STEPS), itertools.repeat(kept, STEPS))
        for name, source in zip(seconds, sources, strict=True):
            start = time.perf_counter()
            train_one_epoch(name, network, source, updates, params)
            seconds[name].append(time.perf_counter() - start)
    augmentation, memory = (values[1:] for values in seconds.values())  # the first round warms up
    images = STEPS * params.train.shared.batch_size
    forward = measure_blocks({"network": network}, params.model.image_size)["network"].macs or 0
    return {
        "images_per_s": images / median(augmentation),
        "data_overhead": median(a / m - 1 for a, m in zip(augmentation, memory, strict=True)),
        # Backward takes twice the multiply-accumulates of forward.
        "gmacs_per_s": 3 * forward * images / median(memory) / 1e9,
        "matrix_gmacs_per_s": matrix_product(),
    }


def matrix_product(size: int = 2048) -> float:
    """Billions of multiply-accumulates per second of one large product of float32 matrices."""
    a, b = torch.rand(2, size, size)
    seconds = []
    for _ in range(WARM_UP + ROUNDS):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return size**3 / median(seconds[WARM_UP:]) / 1e9


def measure(function: str, *arguments: object, **variables: str) -> dict[str, float]:
    """What a function of this module returns, in a process of its own."""
    print("measuring", function, *arguments, *variables, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.bench", function, *map(str, arguments)]
    environment = os.environ | variables
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    missing = [path for path in (PREPARED, BACKBONE, COST) if not path.exists()]
    if missing:
        raise InputError(f"{missing[0]}: is needed; run make repro first")
    turns, contenders = range(REPEATS), [*PEERS, "pipeline"]

    # The same work: median rates, and the median of the ratios in each turn.
    measured = [
        {m: {c: measure("rate", c, m)["images_per_s"] for c in contenders} for m in MODES}
        for _ in turns
    ]
    training = {
        mode: {
            contender: {
                "images_per_s": median(turn[mode][contender] for turn in measured),
                "ratio": median(
                    turn[mode]["pipeline"] / turn[mode][contender] for turn in measured
                ),
            }
            for contender in contenders
        }
        for mode in MODES
    }

    # The same minutes.
    rates = {name: values["images_per_s"] for name, values in training["finetuned"].items()}
    accuracy = {
        name: [measure("reached", name, amount) for amount in wanted]
        for name, wanted in amounts(rates).items()
    }

    # One step.
    steps = [{k: measure("step", n, **pins) for k, (n, pins) in VARIANTS.items()} for _ in turns]
    variants = {
        name: {
            "time_ratio": median(
                turn["2 threads"]["images_per_s"] / turn[name]["images_per_s"] for turn in steps
            )
        }
        | {key: median(turn[name][key] for turn in steps) for key in steps[0][name]}
        for name in VARIANTS
    }

    results = {"training": training, "accuracy": accuracy, "steps": variants}
    write_json(RESULTS, {"machine": machine()} | results)
    figures.save(accuracy_by_minutes(accuracy), FIGURE)
    print_tables(training, accuracy, variants)


def accuracy_by_minutes(reached: dict[str, list[dict[str, float]]]) -> Figure:
    """The accuracy after so many minutes, a line for each contender; the pipeline's is thick."""
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    for (name, points), colour in zip(reached.items(), CONTENDERS, strict=False):
        x, y = ([point[key] for point in points] for key in ("minutes", "accuracy"))
        width = 3 if name == "pipeline" else 1.5
        axes.plot(x, y, color=colour, linewidth=width, marker="o", label=name)
        for minutes, accuracy in zip(x, y, strict=True):
            axes.annotate(
                f"{100 * accuracy:.1f}", (minutes, accuracy), (0, 7), textcoords="offset points",
                ha="center", size=9, color=colour,
            )  # fmt: skip
    axes.set_xlim(left=0)
    title = "Accuracy after so many minutes of fine-tuning"
    figures.label_accuracy(axes, title, "minutes on the same CPU")
    return figure


def print_tables(training: dict, accuracy: dict, variants: dict) -> None:
    print("\nTraining images per second (pipeline: times); same network, image size, batch size\n")
    rows = [
        (
            name,
            *(
                f"{v[name]['images_per_s']:,.0f} ({v[name]['ratio']:.1f})"
                for v in training.values()
            ),
        )
        for name in accuracy
    ]
    print(tabulate(rows, ("", *training)))
    print("\nAccuracy on the test set after so many minutes of fine-tuning\n")
    rows = [
        (name, *(f"{p['accuracy']:.2%} ({p['minutes']:.1f} min)" for p in points))
        for name, points in accuracy.items()
    ]
    print(tabulate(rows, ("", *(f"about {minutes} minutes" for minutes in MINUTES))))
    print("\nA step of fine-tuning: time, images per second, what data work adds, billions of")
    print("multiply-accumulates per second, and those of a large product of matrices\n")
    header = ("variant", "time", "images/s", "data work", "GMAC/s", "matrices")
    formats = ("", ".2f", ".0f", "+.1%", ".0f", ".0f")
    print(tabulate([(n, *v.values()) for n, v in variants.items()], header, floatfmt=formats))


FUNCTIONS: dict[str, Callable[..., dict[str, float]]] = {
    function.__name__: function for function in (rate, reached, step)
}

if __name__ == "__main__":
    if sys.argv[1:]:
        function, *arguments = sys.argv[1:]
        print(json.dumps(FUNCTIONS[function](*arguments)))
    else:
        exit_cleanly(main)
