"""A small generated data set in CIFAR-10's own file format: striped images, a class an angle."""

import hashlib
import pickle
from pathlib import Path

import numpy as np

# CIFAR-10's names, for stripes at 0, 18, ... 162 degrees.
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FILE = 10_000  # images at most, as in CIFAR-10


def images(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """uint8 (count, 3072) in CIFAR-10's channel-major rows, and their labels, equally many."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    angle = (labels * np.pi / len(CLASSES))[:, None, None]
    y, x = np.mgrid[:32, :32]
    phase = draw.uniform(0, 2 * np.pi, (count, 1, 1))
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 0.8 + phase)
    colour = draw.uniform(40, 90, (count, 3, 1, 1))
    noise = draw.normal(0, 40, (count, 3, 32, 32))
    pixels = np.clip(128 + colour * stripes[:, None] + noise, 0, 255).astype(np.uint8)
    order = draw.permutation(count)
    return pixels.reshape(count, -1)[order], labels[order].tolist()


def write(folder: Path, train: int, test: int) -> None:
    """Write data_batch_1, ..., test_batch, batches.meta and their MD5SUMS into `folder`."""
    folder.mkdir(parents=True)
    parts = {f"data_batch_{n + 1}": train - n * FILE for n in range(-(-train // FILE))}
    for seed, (name, left) in enumerate((parts | {"test_batch": test}).items(), 1):
        pixels, labels = images(min(left, FILE), seed)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    lines = "".join(f"{md5}  {name}\n" for name, md5 in sorted(sums.items()))
    (folder / "MD5SUMS").write_bytes(lines.encode())
