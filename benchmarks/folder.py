"""`make bench-folder`: feature extraction on folders of photos, against the usual ImageFolder code.

Generates photos of two classes and trains the head on them, with both in turn. Prints a table:
seconds from the files to the end of the first epoch, seconds of the next epoch, and the peak of
memory without the page cache. On Linux, after `make repro`; 20 minutes, 3 GB of disk.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import yaml
from PIL import Image
from tabulate import tabulate
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.bench import fit
from transfer.model import IMAGENET, load
from transfer.run import model_path, run_tool, set_up_torch
from transfer.settings import load_params

EPOCHS = 2
SETS = {"2,000 photos of 12 megapixels": (2000, 4000, 3000), "20,000 small": (20000, 160, 120),
        "80,000 small": (80000, 160, 120)}  # fmt: skip
PIPELINE = ("stages.download", "stages.network", "stages.train frozen")
CONTENDERS = {"pipeline": PIPELINE, "ImageFolder": ("benchmarks.folder --peer",)}


def make_photos(folder: Path, count: int, width: int, height: int) -> None:
    """JPEGs of smooth colours. Large ones repeat the pixels of 20 of them, to save time."""
    draw, contents = np.random.default_rng(0), []
    for i in range(count):
        path = folder / str(i % 2) / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if width < 1000 or i < 20:
            colours = Image.fromarray(draw.integers(0, 255, (6, 8, 3), np.uint8))
            colours.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
            contents.append(path.read_bytes() if width > 1000 else b"")
        else:
            path.write_bytes(contents[i % 20] + i.to_bytes(4, "little"))  # another file


def image_folder() -> None:
    """The usual code: ImageFolder, a DataLoader with two workers, and a plain loop."""
    params = load_params()
    size, shared = params.model.image_size, params.train.shared
    steps = [
        transforms.Resize(size),
        transforms.CenterCrop(size),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(*IMAGENET.values()),
    ]
    photos = datasets.ImageFolder(params.data.source, transforms.Compose(steps))
    loader = DataLoader(photos, shared.batch_size, shuffle=True, num_workers=2)
    network = load(model_path("new"), set_up_torch("cpu", params.train.threads))
    fit(network, params, loader, [network.head], EPOCHS)


def watch(process: psutil.Process, peak: list[int]) -> None:
    """Keep in `peak` the most memory, in MiB, of a process and its children without page cache."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        total = 0
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):  # it has just ended
                memory = one.memory_info()
                total += memory.rss - getattr(memory, "shared", 0)
        peak[0] = max(peak[0], total // 2**20)
        time.sleep(0.2)


def measure(project: Path, commands: tuple[str, ...]) -> tuple[float, float, int]:
    """Seconds to the end of the first epoch and of the next one, and the peak in MiB."""
    peak, ends, start = [0], [], time.perf_counter()
    for command in commands:
        with subprocess.Popen(
            [sys.executable, "-m", *command.split()], cwd=project, encoding="utf-8",
            stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        ) as child:  # fmt: skip
            threading.Thread(target=watch, args=[psutil.Process(child.pid), peak]).start()
            assert child.stdout
            ends += [
                time.perf_counter() for line in child.stdout if line.startswith("frozen epoch")
            ]
    return ends[0] - start, ends[1] - ends[0], peak[0]


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.folder", description=__doc__)
    parser.add_argument("--peer", action="store_true", help="only the usual code, in this folder")
    if parser.parse_args().peer:
        image_folder()
        return
    values, rows = load_params().model_dump(), []
    values["data"]["source"] = "photos"
    values["train"]["frozen"] |= {"epochs": EPOCHS, "views": 1}
    for photos, (count, width, height) in SETS.items():
        with tempfile.TemporaryDirectory(dir="data", prefix="bench-") as folder:
            project = Path(folder)
            (project / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
            make_photos(project / "photos", count, width, height)
            for name, commands in CONTENDERS.items():
                rows.append((photos, name, *measure(project, commands)))
                print(rows[-1], flush=True)
    header = ("", "", "first epoch, s", "next epoch, s", "peak, MiB")
    print(tabulate(rows, header, floatfmt=".1f"))


if __name__ == "__main__":
    run_tool(main)
