"""What the speed claims rest on: `make bench`, after `make repro`. About 15 minutes on 2 cores.

Measures, in turns in one run, the training images per second of the usual notebook and of the
pipeline, with the same network, image size and batch size; then the pipeline's fine-tuning step
with and without data work, on other thread counts, and with other CPU instructions. Prints tables
and writes benchmarks/results.json. Nothing else should run meanwhile.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from tabulate import tabulate
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import CIFAR10

from transfer.common.arrays import PREPARED, load_classes, load_split
from transfer.common.errors import InputError, exit_cleanly
from transfer.common.files import write_json
from transfer.common.machine import machine
from transfer.common.params import MODES, load_params, merge
from transfer.fetch import assets_dir
from transfer.inference import choose_device
from transfer.model.backbone import freeze
from transfer.model.network import build, fill, load_weights
from transfer.training.batches import augmented
from transfer.training.loop import train, train_one_epoch
from transfer.training.optimizer import make_optimizers, make_schedules

RESULTS = Path("benchmarks/results.json")
BACKBONE = Path("models/backbone.safetensors")  # of the stage backbone
REPEATS, SAMPLE = 3, 6400  # turns; images in each
WARM_UP, STEPS, ROUNDS = 3, 10, 5
# So that CPUs with more than AVX2 compute as those without, by torch, oneDNN and MKL.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}
VARIANTS: dict[str, tuple[int, dict[str, str]]] = {
    "2 threads": (2, {}), "1 thread": (1, {}), "4 threads": (4, {}), "2 threads, AVX2": (2, AVX2),
}  # fmt: skip


def notebook(mode: str) -> dict[str, float]:
    """The usual notebook: torchvision's data set in a DataLoader with two workers.

    Images are augmented and scaled one by one with PIL, and the backbone is computed in each epoch.
    """
    params = load_params()
    settings = params.train.shared
    torch.set_num_threads(params.train.threads)
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, settings.max_shift, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            transforms.Resize(params.model.image_size),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    assets = assets_dir()
    dataset = CIFAR10(assets or Path("data"), True, transform, download=not assets)
    subset = Subset(dataset, range(SAMPLE))
    loader = DataLoader(subset, settings.batch_size, shuffle=True, num_workers=2, drop_last=True)
    network = build(params.model, 10)
    fill(network.backbone, load_weights(BACKBONE), str(BACKBONE))
    network.train()
    if mode == "frozen":
        freeze(network.backbone)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    start = 0.0
    for batch, (x, labels) in enumerate(loader):
        if batch == WARM_UP:
            start = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    return {"images_per_s": (len(loader) - WARM_UP) * settings.batch_size / seconds}


def pipeline(mode: str) -> dict[str, float]:
    """The pipeline's training, in mode frozen with the feature extraction of all its epochs."""
    epochs = load_params().train.frozen.epochs if mode == "frozen" else 1
    full_size = {"finetuned": {"initial_scale": 1.0}}
    params = load_params().changed({"train": merge(full_size, {mode: {"epochs": epochs}})})
    device = choose_device("cpu", params.train.threads)
    network = build(params.model, 10)
    fill(network.backbone, load_weights(BACKBONE), str(BACKBONE))
    split = load_split(PREPARED, "train", load_classes(PREPARED)).take(torch.arange(SAMPLE))
    two = split.take(torch.arange(2))  # images to validate on: not to be timed
    start = time.perf_counter()
    train(network, mode, split, two, params, device, lambda *_: None)
    return {"images_per_s": SAMPLE * epochs / (time.perf_counter() - start)}


def step(threads: str) -> dict[str, float]:
    """Fine-tuning steps, in turns on augmented images and on one batch kept in memory."""
    params = load_params()
    choose_device("cpu", int(threads))
    network = build(params.model, 10).to(memory_format=torch.channels_last)
    optimizers = make_optimizers(network, "finetuned", params)
    schedules = make_schedules(optimizers, 2 * STEPS * (ROUNDS + 1), 0, params)
    data = load_split(PREPARED, "train", load_classes(PREPARED))
    batches = augmented(data, params, params.train.finetuned.epochs - 1)  # at full size
    kept = next(batches)
    seconds: dict[str, list[float]] = {"augmented": [], "in memory": []}
    for _ in range(ROUNDS + 1):
        sources = (itertools.islice(batches, STEPS), itertools.repeat(kept, STEPS))
        for name, source in zip(seconds, sources, strict=True):
            start = time.perf_counter()
            train_one_epoch(name, network, source, optimizers, schedules, params)
            seconds[name].append(time.perf_counter() - start)
    augmentation, memory = (values[1:] for values in seconds.values())  # the first round warms up
    return {
        "images_per_s": STEPS * params.train.shared.batch_size / median(augmentation),
        "data_overhead": median(a / m - 1 for a, m in zip(augmentation, memory, strict=True)),
    }


def measure(function: str, argument: object, **variables: str) -> dict[str, float]:
    """What a function of this module returns, in a process of its own."""
    print("measuring", function, argument, *variables, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.bench", function, str(argument)]
    environment = os.environ | variables
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    if not PREPARED.is_dir() or not BACKBONE.is_file():
        raise InputError(f"{PREPARED}, {BACKBONE}: are needed; run make repro first")
    turns = range(REPEATS)
    training = {}
    for mode in MODES:
        rates = [[measure(way, mode)["images_per_s"] for way in WAYS] for _ in turns]
        usual, ours = (median(values) for values in zip(*rates, strict=True))
        ratios = [pipeline_rate / notebook_rate for notebook_rate, pipeline_rate in rates]
        training[mode] = {"notebook": usual, "pipeline": ours, "ratio": median(ratios)}
    steps = [{k: measure("step", n, **pins) for k, (n, pins) in VARIANTS.items()} for _ in turns]
    variants = {
        name: {
            "images_per_s": median(turn[name]["images_per_s"] for turn in steps),
            "time_ratio": median(
                turn["2 threads"]["images_per_s"] / turn[name]["images_per_s"] for turn in steps
            ),
            "data_overhead": median(turn[name]["data_overhead"] for turn in steps),
        }
        for name in VARIANTS
    }
    write_json(RESULTS, {"machine": machine(), "training": training, "steps": variants})
    print("\nTraining images per second; same network, image size and batch size\n")
    rows = [(mode, *values.values()) for mode, values in training.items()]
    print(tabulate(rows, ("mode", "notebook", "pipeline", "ratio"), floatfmt=".1f"))
    print("\nA step of fine-tuning: images per second, time, and what data work adds to it\n")
    header, formats = ("variant", "images/s", "time", "data work"), (".0f", ".0f", ".2f", "+.1%")
    print(tabulate([(n, *v.values()) for n, v in variants.items()], header, floatfmt=formats))


WAYS = {"notebook": notebook, "pipeline": pipeline}

if __name__ == "__main__":
    if sys.argv[1:]:
        function, argument = sys.argv[1:]
        print(json.dumps((WAYS | {"step": step})[function](argument)))
    else:
        exit_cleanly(main)
