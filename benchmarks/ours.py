"""The pipeline's own training: `python -m benchmarks.ours MODE IMAGES EPOCHS IMAGE_SIZE SEED`.

Prints JSON: the images per second, the seconds that training took in all, with the frozen
features' computation, and the accuracy on the test set. `python -m benchmarks.ours step THREADS`
compares the step of fine-tuning on augmented images with the same step on one batch in memory.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import torch

from transfer import data, model, params, training
from transfer.params import Model, Params

ARRAYS = Path("data/cifar10")  # of the stage `download`
STEPS, ROUNDS = 10, 5


def pretrained(settings: Model) -> torch.nn.Sequential:
    """The network that `settings` describe, its backbone pretrained, its head random."""
    network = model.build(settings, 10)
    state = model.pretrained(settings.name, settings.weights)
    model.fill(network.backbone, state, settings.weights)
    return network


def prepare(settings: Params) -> tuple[torch.device, torch.nn.Sequential]:
    device = training.set_up(settings.train.device, settings.train.threads)
    torch.manual_seed(settings.seed)
    return device, pretrained(settings.model)


def main(mode: str, images: int, epochs: int, image_size: int, seed: int) -> dict[str, float]:
    document = params.load().model_dump()
    document["seed"] = seed
    document["model"]["image_size"] = image_size
    document["train"][mode]["epochs"] = epochs
    settings = Params.model_validate(document)
    device, network = prepare(settings)
    classes = data.load_classes(ARRAYS)
    split = data.Split(*(t[:images] for t in data.load_split(ARRAYS, "train", classes)))
    test = data.load_split(ARRAYS, "test", classes)
    two = data.Split(*(t[:2] for t in split))  # held-out images to report on: not to be timed
    start = time.perf_counter()
    training.train(network, mode, split, two, settings, device, lambda *_: None)
    seconds = time.perf_counter() - start
    right = training.predict(network, test.images, image_size).argmax(1) == test.labels
    return {
        "images_per_s": images * epochs / seconds,
        "seconds": seconds,
        "accuracy": right.double().mean().item(),
    }


def step(threads: int) -> dict[str, list[float]]:
    """Images per second of STEPS steps, in turns: on augmented images, and on one batch kept."""
    settings = params.load()
    device, network = prepare(settings)
    torch.set_num_threads(threads)
    network.to(device, memory_format=torch.channels_last)
    optimizer = training.optimizer_for(network, "finetuned", settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1e-3)
    arrays = data.load_split(ARRAYS, "train", data.load_classes(ARRAYS))
    split = data.Split(*(t.to(device) for t in arrays))
    last = settings.train.finetuned.epochs - 1  # of full-sized pictures
    batches = training.augmented(split, settings, last)
    kept = next(batches)
    rates = {"augmented": [], "in memory": []}
    for _ in range(ROUNDS + 1):
        for name, source in (
            ("augmented", itertools.islice(batches, STEPS)),
            ("in memory", itertools.repeat(kept, STEPS)),
        ):
            start = time.perf_counter()
            training.one_epoch(name, network, source, optimizer, schedule, settings)
            seconds = time.perf_counter() - start
            rates[name].append(STEPS * settings.train.batch_size / seconds)
    return {name: values[1:] for name, values in rates.items()}  # the first round warms up


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    numbers = map(int, arguments)
    print(json.dumps(step(*numbers) if command == "step" else main(command, *numbers)))
