"""What the speed claims rest on: `make bench`, after `make repro`. About an hour on 2 cores.

Measures side by side in one run, nothing else running meanwhile: the training images per second of
the pipeline and of what people usually write (benchmarks/peers.py), with the same network, image
size and batch size; and the accuracy on the test set that each has reached after the same minutes.
Prints tables and writes benchmarks/results.json and docs/minutes.png.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tabulate import tabulate

from benchmarks.peers import PEERS, new_network
from transfer import figures
from transfer.common.dataset import load_classes, load_split, stratified
from transfer.common.errors import InputError, exit_cleanly
from transfer.common.files import write_json
from transfer.common.paths import COST, PREPARED, model_path
from transfer.common.run import machine
from transfer.common.settings import MODES, load_params, merge
from transfer.inference import predict, set_up_torch
from transfer.model import Network
from transfer.training.loop import train
from transfer.training.modes import make_mode

RESULTS, FIGURE = Path("benchmarks/results.json"), Path("docs/minutes.png")
REPEATS, SAMPLE = 3, 3200  # turns; images in each
MINUTES = (2, 6)  # of fine-tuning
# Colours and markers, the pipeline's last.
CONTENDERS = (("#56B4E9", "^"), ("#009E73", "v"), ("#CC79A7", "D"), ("#D55E00", "s"))
WARM_UP = 3  # steps of a peer that are not timed


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


def measure(function: str, *arguments: object) -> dict[str, float]:
    """What a function of this module returns, in a process of its own."""
    print("measuring", function, *arguments, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.bench", function, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    missing = [path for path in (PREPARED, model_path("new"), COST) if not path.exists()]
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

    results = {"training": training, "accuracy": accuracy}
    write_json(RESULTS, {"machine": machine()} | results)
    figures.save(accuracy_by_minutes(accuracy), FIGURE)
    print_tables(training, accuracy)


def accuracy_by_minutes(reached: dict[str, list[dict[str, float]]]) -> figures.Figure:
    """The accuracy after so many minutes, a line for each contender; the pipeline's is thick."""
    figure, axes = figures.plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    for (name, points), (colour, marker) in zip(reached.items(), CONTENDERS, strict=False):
        x, y = ([point[key] for point in points] for key in ("minutes", "accuracy"))
        width = 3 if name == "pipeline" else 1.5
        axes.plot(x, y, color=colour, linewidth=width, marker=marker, label=name)
        for minutes, accuracy in zip(x, y, strict=True):
            axes.annotate(
                f"{100 * accuracy:.1f}", (minutes, accuracy), (0, 7), textcoords="offset points",
                ha="center", size=9, color=colour,
            )  # fmt: skip
    axes.set_xlim(left=0)
    title = "Accuracy after so many minutes of fine-tuning"
    figures.label_accuracy(axes, title, "minutes on the same CPU")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def print_tables(training: dict, accuracy: dict) -> None:
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


FUNCTIONS: dict[str, Callable[..., dict[str, float]]] = {
    function.__name__: function for function in (rate, reached)
}

if __name__ == "__main__":
    if sys.argv[1:]:
        function, *arguments = sys.argv[1:]
        print(json.dumps(FUNCTIONS[function](*arguments)))
    else:
        exit_cleanly(main)
