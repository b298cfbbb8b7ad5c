"""Transfer learning on small generated images, in a temporary clone: nothing is downloaded.

A network is trained from scratch on many images of sloping stripes. The weights of its first blocks
are then the pretrained weights for another task, which has few images, of diamonds. For this task,
networks are trained from scratch, frozen and fine-tuned. Their figures and tables stay in demo/.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from PIL import Image

from transfer.model import load
from transfer.run import METRICS, model_path, run_tool
from transfer.settings import InputError

OUTPUT = Path("demo")
CLASSES = 10
SMALL = {
    "model.weights": "null", "model.image_size": 32, "train.device": "cpu",
    "train.shared.batch_size": 32, "train.shared.min_steps": 20,
    "train.shared.validation_share": 0.125, "train.frozen.epochs": 6, "train.frozen.views": 2,
    "train.finetuned.epochs": 6, "train.finetuned.initial_scale": 1.0,
    "figures.first_batch_size": 16,
}  # fmt: skip
# Random weights must change further than pretrained ones, and need statistics of their own.
FROM_SCRATCH = {
    "start": "new", "muon_lr": 0.02, "head_lr": 5e-3, "backbone_lr": 2e-3, "batch_norm_until": 0.5
}  # fmt: skip


def striped(count: int, seed: int, diamonds: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Striped images, uint8 (count, 32, 32, 3), and their classes, int (count,), which are angles.

    Stripes slope to either side, so that a mirrored image has the same class; diamonds are stripes
    of both sides laid over each other.
    """
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    angle = (labels * np.pi / 2 / CLASSES)[:, None, None]
    y, x = np.mgrid[:32, :32]
    phase = draw.uniform(0, 2 * np.pi, (count, 1, 1))
    colour = draw.uniform(40, 90, (count, 1, 1, 3))
    noise = draw.normal(0, 40, (count, 32, 32, 3))
    side = draw.choice([-1, 1], (count, 1, 1))
    waves = np.sin((x * np.cos(angle) + side * y * np.sin(angle)) * 0.8 + phase)
    if diamonds:
        other = np.sin((x * np.cos(angle) - side * y * np.sin(angle)) * 0.8 + phase[::-1])
        waves = (waves + other) / 2
    pixels = np.clip(128 + colour * waves[..., None] + noise, 0, 255)
    return pixels.astype(np.uint8), labels


def write_images(folder: Path, train: int, test: int, diamonds: bool = False) -> None:
    """Write generated images as `folder`/{train,test}/CLASS/NUMBER.png."""
    for seed, (split, count) in enumerate({"train": train, "test": test}.items()):
        for i, (pixels, label) in enumerate(zip(*striped(count, seed, diamonds), strict=True)):
            path = folder / split / f"angle {label}" / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def environment() -> dict[str, str]:
    """For a repository of its own: nothing of the one around it, and somebody who commits."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    who = [f"GIT_{who}_{what}" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")]
    return kept | dict.fromkeys(who, "demo") | {"PATH": path}


def train(clone: Path, title: str, target: str, settings: dict[str, Any]) -> dict[str, float]:
    """Run the stages up to `target` in `clone`; the metrics, if there are any yet."""
    print(f"DEMO {title}", flush=True)
    options = [f"-S{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "dvc", "exp", "run", *options, target]
    if subprocess.run(command, cwd=clone, env=environment()).returncode:
        raise InputError("dvc exp run failed in the demo; its message stands above")
    path = clone / METRICS / "evaluation.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def demo(clone: Path) -> None:
    command = ["git", "clone", "--quiet", str(Path.cwd()), str(clone)]
    subprocess.run(command, env=environment(), check=True)
    write_images(clone / "slopes", 3000, 20)
    write_images(clone / "diamonds", 200, 1000, diamonds=True)
    scratch = {f"train.finetuned.{key}": value for key, value in FROM_SCRATCH.items()}
    slopes = SMALL | scratch | {"data.source": "slopes"}
    train(clone, "1 of 3: pretrain on 3,000 images of stripes", "train@finetuned", slopes)
    backbone = load(clone / model_path("finetuned")).backbone.body
    safetensors.torch.save_model(backbone, str(clone / "weights/slopes.safetensors"))

    few = SMALL | scratch | {"data.source": "diamonds"}
    before = train(clone, "2 of 3: 200 images of diamonds, from scratch", "evaluate", few)
    subprocess.run(["git", "restore", "params.yaml"], cwd=clone, env=environment(), check=True)
    few = SMALL | {"data.source": "diamonds", "model.weights": "weights/slopes.safetensors"}
    after = train(clone, "3 of 3: the same images, pretrained on stripes", "render", few)
    for name in ("figures", "metrics"):
        shutil.copytree(clone / name, OUTPUT / name, dirs_exist_ok=True)
    print(
        f"On 1,000 test images: {before['finetuned.accuracy']:.1%} from scratch; pretrained, "
        f"{after['frozen.accuracy']:.1%} frozen and {after['finetuned.accuracy']:.1%} fine-tuned. "
        f"The figures and tables are in {OUTPUT}/."
    )


def main() -> None:
    argparse.ArgumentParser("python -m tools.demo", description=__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as folder:
        demo(Path(folder, "clone"))


if __name__ == "__main__":
    run_tool(main)
