"""The same pipeline on a small generated data set, in a temporary copy: no network, no weights."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tools.isolated import environment, git
from transfer.common.errors import exit_cleanly, fail
from transfer.common.settings import load_params, merge

ROOT = Path(__file__).parents[1]
# What a project is made of, without its results.
PARTS = (
    ".dvc/.gitignore", ".dvc/config", ".dvc/plots", ".dvcignore", ".gitattributes", ".gitignore",
    "Makefile", "benchmarks", "cifar10.md5", "dvc.yaml", "params.yaml", "stages", "tools",
    "transfer", "weights",
)  # fmt: skip
# Random weights must change further than pretrained ones, and need statistics of their own.
FROM_SCRATCH = {
    "muon_lr": 0.02,
    "head_lr": 5e-3,
    "backbone_lr": 2e-3,
    "initial_scale": 0.5,
    "batch_norm_until": 0.5,
}
SETTINGS: dict[str, Any] = {
    "data": {"source": "stripes"},
    "model": {"weights": None, "image_size": 32},
    "train": {
        "device": "cpu",
        "shared": {"batch_size": 32, "min_steps": 1, "validation_share": 0.125},
        "frozen": {"epochs": 6, "views": 2},
        "finetuned": {"epochs": 6, **FROM_SCRATCH},
    },
    "figures": {"first_batch_size": 16},
}
# CIFAR-10's names, for stripes at 0, 18, ... 162 degrees.
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def stripes(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Striped images, uint8 (count, 32, 32, 3), a class an angle, and their labels, in turn."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    angle = (labels * np.pi / len(CLASSES))[:, None, None]
    y, x = np.mgrid[:32, :32]
    phase = draw.uniform(0, 2 * np.pi, (count, 1, 1))
    waves = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 0.8 + phase)
    colour = draw.uniform(40, 90, (count, 1, 1, 3))
    noise = draw.normal(0, 40, (count, 32, 32, 3))
    pixels = np.clip(128 + colour * waves[..., None] + noise, 0, 255)
    return pixels.astype(np.uint8), labels.tolist()


def write_stripes(folder: Path, train: int, test: int) -> None:
    """Write generated images as `folder`/{train,test}/CLASS/NUMBER.png."""
    for seed, (split, count) in enumerate((("train", train), ("test", test))):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        for number, (pixels, label) in enumerate(zip(*stripes(count, seed), strict=True)):
            Image.fromarray(pixels).save(folder / split / CLASSES[label] / f"{number:05}.png")


def make_project(
    folder: Path, train: int = 400, test: int = 200, settings: dict[str, Any] = SETTINGS
) -> None:
    """Copy the project without its results into `folder`, a Git repository of its own.

    `settings` are merged into its params.yaml; its data, in stripes/, is a generated set of
    `train` + `test` images.
    """
    for name in PARTS:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(source, target)
    document = merge(load_params(str(folder / "params.yaml")).model_dump(), settings)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    write_stripes(folder / "stripes", train, test)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "generated")


def run(folder: Path) -> None:
    """Make a project in `folder`, reproduce it, show its metrics."""
    notice = "DEMO on generated stripes: it shows how the pipeline runs; its numbers mean nothing."
    print(notice, flush=True)
    make_project(folder)
    for command in ("repro", "metrics show --md"):
        dvc = [sys.executable, "-m", "dvc", *command.split()]
        if subprocess.run(dvc, cwd=folder, env=environment()).returncode:
            fail(f"dvc {command} failed in the demo; its own message stands above")
    print(notice)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as folder:
        run(Path(folder))


if __name__ == "__main__":
    exit_cleanly(main)
