"""What the speed claims rest on: `make bench`, after `make repro`. About 90 minutes on 2 cores.

Measures side by side in one run, nothing else running meanwhile: the training images per second of
the pipeline and of what people usually write (benchmarks/peers.py), with the same network, image
size and batch size; and the minutes that each needs, with both phases, to the same accuracy on the
test set. Prints tables and writes benchmarks/results.json and docs/minutes.png. What has been
measured is kept in .checkpoints until then: started again with the same code and settings on the
same machine, it goes on from there.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tabulate import tabulate

from benchmarks.peers import LIBRARIES, PEERS, new_network
from transfer import figures
from transfer.common.dataset import load_classes, load_split, stratified
from transfer.common.errors import InputError, exit_cleanly
from transfer.common.files import write_json
from transfer.common.paths import PREPARED, model_path
from transfer.common.run import machine
from transfer.common.settings import MODES, load_params, merge
from transfer.inference import predict, set_up_torch
from transfer.training.checkpoint import checkpoint_path
from transfer.training.loop import train
from transfer.training.modes import make_mode

RESULTS, FIGURE = Path("benchmarks/results.json"), Path("docs/minutes.png")
REPEATS, SAMPLE = 3, 3200  # turns; images in each
WARM_UP = 3  # steps of a peer that are not timed
# About so many minutes of training, each with its whole schedule of learning rates. Of the peers,
# their images per second say how many steps that is; the pipeline has these epochs and views.
RUNS = {
    2: {"frozen": {"epochs": 2, "views": 1}, "finetuned": {"epochs": 1}},
    5: {"frozen": {"epochs": 4, "views": 2}, "finetuned": {"epochs": 2}},
    12: {"frozen": {"epochs": 6, "views": 3}, "finetuned": {"epochs": 5}},
}
ACCURACIES = (0.85, 0.87, 0.89)
# Colours and markers, the pipeline's last.
CONTENDERS = (("#56B4E9", "^"), ("#009E73", "v"), ("#CC79A7", "D"), ("#D55E00", "s"))


def rate(contender: str, mode: str, turn: str) -> dict[str, float]:
    """Training images per second, without the start. Each `turn` measures the same again.

    The pipeline's are those of whole trainings on fewer images, in mode frozen with the feature
    extraction.
    """
    params = load_params()
    device = set_up_torch("cpu", params.train.threads)
    if contender in PEERS:
        times: list[float] = []
        steps = SAMPLE // params.train.shared.batch_size
        epochs = dict.fromkeys(MODES, 0) | {mode: 1}
        PEERS[contender](epochs, steps, lambda: times.append(time.perf_counter()))
        seconds = (times[-1] - times[WARM_UP - 1]) / (len(times) - WARM_UP)
        return {"images_per_s": params.train.shared.batch_size / seconds}
    count = params.train.frozen.epochs if mode == "frozen" else 2
    equal = {"shared": {"min_steps": 1}, "finetuned": {"initial_scale": 1.0}}
    params = params.changed({"train": merge(equal, {mode: {"epochs": count}})})
    split = load_split(PREPARED, "train", load_classes(PREPARED)).take(torch.arange(SAMPLE))
    two = split.take(torch.arange(2))  # images to validate on: not to be timed
    start = time.perf_counter()
    train(make_mode(mode, new_network(), split, params, device), two)
    return {"images_per_s": SAMPLE * count / (time.perf_counter() - start)}


def reached(contender: str, *amount: str) -> dict[str, float]:
    """Minutes of training in both phases, and the accuracy on the test set then.

    `amount` is one of RUNS for the pipeline, epochs of fine-tuning and steps in each for a peer.
    """
    params = load_params()
    device = set_up_torch("cpu", params.train.threads)
    classes = load_classes(PREPARED)
    import_module(LIBRARIES.get(contender, "torch"))  # not timed, as the pipeline's are not
    start = time.perf_counter()
    if contender in PEERS:
        epochs, steps = map(int, amount)
        network = PEERS[contender](dict(zip(MODES, (1, epochs), strict=True)), steps, lambda: None)
    else:  # as the stages train, validation included
        params = params.changed({"train": RUNS[int(*amount)]})
        data = load_split(PREPARED, "train", classes)
        share = params.train.shared.validation_share
        rest, drawn = stratified(data.labels, share, classes, params.seed, "validation_share")
        network = new_network()
        for mode in MODES:
            network.requires_grad_(True)
            learning = make_mode(mode, network, data.take(rest), params, device)
            train(learning, data.take(drawn))
    minutes = (time.perf_counter() - start) / 60
    images, labels = load_split(PREPARED, "test", classes)
    predicted = predict(network, images, params.model.image_size).argmax(1)
    return {"minutes": minutes, "accuracy": (predicted == labels).double().mean().item()}


def amounts(contender: str, minutes: float, rates: dict[str, float]) -> tuple[int, ...]:
    """What `reached` takes, so that training lasts about `minutes`.

    A peer trains the head alone in its first epoch, as their guides do. Epochs are as few as have
    no image twice.
    """
    if contender == "pipeline":
        return (int(minutes),)
    size = load_params().train.shared.batch_size
    images = len(load_split(PREPARED, "train", load_classes(PREPARED)).labels)
    epochs, steps = 0, images
    while steps * size > images:
        epochs += 1
        seconds = size / rates["frozen"] + epochs * size / rates["finetuned"]
        steps = round(60 * minutes / seconds)
    return epochs, steps


def minutes_to(accuracy: float, runs: list[dict[str, float]]) -> float | None:
    """Minutes to `accuracy`, read between `runs`, whose minutes rise, on a logarithmic scale.

    None where none of them reaches it. Where the shortest does, its minutes: it is at most these.
    """
    best: dict[float, float] = {}
    for run in runs:  # one that a shorter one beats does not count
        if run["accuracy"] > max(best, default=0.0):
            best[run["accuracy"]] = np.log(run["minutes"])
    found = float(np.exp(np.interp(accuracy, [*best], [*best.values()], right=np.nan)))
    return None if np.isnan(found) else found


def measure(measured: Path, *arguments: object) -> dict[str, float]:
    """What a function of this module, the first argument, returns for the others.

    It has a process of its own. The result is kept in a line of the file `measured`, with the
    arguments, and taken from there if it is there.
    """
    call = [*map(str, arguments)]
    if measured.exists():
        for line in measured.read_text(encoding="utf-8").splitlines():
            known, values = json.loads(line)
            if known == call:
                return values
    print("measuring", *call, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.bench", *call]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    values = json.loads(output.splitlines()[-1])
    measured.parent.mkdir(exist_ok=True)
    with measured.open("a", encoding="utf-8") as file:
        print(json.dumps([call, values]), file=file)
    return values


def main() -> None:
    missing = [path for path in (PREPARED, model_path("new")) if not path.exists()]
    if missing:
        raise InputError(f"{missing[0]}: is needed; run make repro first")
    contenders = [*PEERS, "pipeline"]
    measured = checkpoint_path("benchmark", [Path("params.yaml"), *Path("benchmarks").glob("*.py")])

    # The same work: median rates, and the median of the ratios in each turn.
    turns = [
        {
            (m, c): measure(measured, "rate", c, m, turn)["images_per_s"]
            for m in MODES
            for c in contenders
        }
        for turn in range(REPEATS)
    ]
    training = {
        mode: {
            name: {
                "images_per_s": median(turn[mode, name] for turn in turns),
                "ratio": median(turn[mode, "pipeline"] / turn[mode, name] for turn in turns),
            }
            for name in contenders
        }
        for mode in MODES
    }

    # The same accuracy: side by side, so that a change in the machine's speed reaches all.
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for minutes, name in product(RUNS, contenders):
        rates = {mode: training[mode][name]["images_per_s"] for mode in MODES}
        runs[name].append(measure(measured, "reached", name, *amounts(name, minutes, rates)))
    goals = {f"{goal:.0%}": goal for goal in ACCURACIES}
    goals |= {f"{name}'s last": runs[name][-1]["accuracy"] for name in PEERS}
    needed = {
        name: {goal: minutes_to(accuracy, runs[name]) for goal, accuracy in goals.items()}
        for name in contenders
    }

    results = {"training": training, "runs": runs, "minutes_to": needed}
    write_json(RESULTS, {"machine": machine()} | results)
    figures.save(accuracy_by_minutes(runs), FIGURE)
    print_tables(training, runs, needed)
    measured.unlink()


def accuracy_by_minutes(runs: dict[str, list[dict[str, float]]]) -> figures.Figure:
    """The accuracy after so many minutes, a line for each contender; the pipeline's is thick."""
    figure, axes = figures.plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    axes.set_xscale("log")
    for (name, points), (colour, marker) in zip(runs.items(), CONTENDERS, strict=True):
        x, y = ([point[key] for point in points] for key in ("minutes", "accuracy"))
        width = 3 if name == "pipeline" else 1.5
        axes.plot(x, y, color=colour, linewidth=width, marker=marker, label=name)
    for accuracy in ACCURACIES:
        axes.axhline(accuracy, color="0.6", linewidth=1, zorder=0)
    axes.set_xticks(list(RUNS), [f"{minutes}" for minutes in RUNS])
    axes.minorticks_off()
    title = "Accuracy after so many minutes of training, both phases"
    figures.label_accuracy(axes, title, "minutes on the same CPU (logarithmic)")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def print_tables(training: dict, runs: dict, needed: dict) -> None:
    print("\nTraining images per second (pipeline: times), the same network, sizes and batches\n")
    rows = []
    for name in runs:
        cells = (training[mode][name] for mode in MODES)
        rows.append((name, *(f"{c['images_per_s']:,.0f} ({c['ratio']:.1f})" for c in cells)))
    print(tabulate(rows, ("", *MODES)))
    print("\nAccuracy on the test set after so many minutes, both phases\n")
    for name, points in runs.items():
        print(name, *(f"{run['accuracy']:.2%} ({run['minutes']:.1f} min)" for run in points))
    print("\nMinutes to an accuracy, and to that of a peer's last run (none: not reached; at most")
    print("those of the shortest run, where they are its)\n")
    rows = [(name, *minutes.values()) for name, minutes in needed.items()]
    print(tabulate(rows, ("", *needed["pipeline"]), floatfmt=".1f", missingval="none"))


FUNCTIONS: dict[str, Callable[..., dict[str, float]]] = {
    function.__name__: function for function in (rate, reached)
}

if __name__ == "__main__":
    if sys.argv[1:]:
        function, *arguments = sys.argv[1:]
        print(json.dumps(FUNCTIONS[function](*arguments)))
    else:
        exit_cleanly(main)
