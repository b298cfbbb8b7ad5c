"""Transfer learning told on small generated images, in a temporary copy: nothing is downloaded.

A network is trained from scratch on many images of sloping stripes. Its first blocks are then the
pretrained weights for another task, with few images of diamonds: frozen, fine-tuned, and compared
with training from scratch. The figures and tables stay in demo/.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from tools.isolated import environment, git
from tools.setup import wait_for
from transfer.common.errors import exit_cleanly, fail
from transfer.common.files import replacing
from transfer.common.paths import model_path
from transfer.common.settings import load_params, merge
from transfer.model import load_network, save_weights

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
    "weight_decay": 0.2,
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
WEIGHTS = "weights/slopes.safetensors"
PRETRAINING = {"data": {"source": "slopes"}, "train": {"finetuned": {"start": "new"}}}
SMALL = {"epochs": 6, "initial_scale": 1.0}  # images of 32 pixels cannot be made smaller
KEPT = Path("demo")
# CIFAR-10's names, for stripes at 0, 18, ... 162 degrees.
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def stripes(count: int, seed: int, kind: str = "stripes") -> tuple[np.ndarray, list[int]]:
    """Striped images, uint8 (count, 32, 32, 3), a class an angle, and their labels, in turn.

    Of the kind "slopes", either side may be the higher one, so that a mirrored image has the same
    class; of the kind "diamonds", stripes that rise and stripes that fall are laid over each other.
    """
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    right = np.pi if kind == "stripes" else np.pi / 2
    angle = (labels * right / len(CLASSES))[:, None, None]
    y, x = np.mgrid[:32, :32]
    phase = draw.uniform(0, 2 * np.pi, (count, 1, 1))
    colour = draw.uniform(40, 90, (count, 1, 1, 3))
    noise = draw.normal(0, 40, (count, 32, 32, 3))
    side = draw.choice([-1, 1], (count, 1, 1)) if kind == "slopes" else 1
    waves = np.sin((x * np.cos(angle) + side * y * np.sin(angle)) * 0.8 + phase)
    if kind == "diamonds":
        waves = (waves + np.sin((x * np.cos(angle) - y * np.sin(angle)) * 0.8 + phase[::-1])) / 2
    pixels = np.clip(128 + colour * waves[..., None] + noise, 0, 255)
    return pixels.astype(np.uint8), labels.tolist()


def write_stripes(folder: Path, train: int, test: int, kind: str = "stripes") -> None:
    """Write generated images as `folder`/{train,test}/CLASS/NUMBER.png."""
    names = CLASSES if kind == "stripes" else [f"{9 * i} degrees" for i in range(len(CLASSES))]
    for seed, (split, count) in enumerate((("train", train), ("test", test))):
        for name in names:
            (folder / split / name).mkdir(parents=True)
        for number, (pixels, label) in enumerate(zip(*stripes(count, seed, kind), strict=True)):
            Image.fromarray(pixels).save(folder / split / names[label] / f"{number:05}.png")


def set_params(folder: Path, changes: dict[str, Any]) -> None:
    """Make `changes` in the params.yaml of `folder`."""
    path = folder / "params.yaml"
    document = merge(load_params(str(path)).model_dump(), changes)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


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
    set_params(folder, settings)
    write_stripes(folder / "stripes", train, test)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "generated")


def run(folder: Path, *command: str) -> None:
    """Run Python with `command` in the project in `folder`."""
    print(f"DEMO: {' '.join(command).removeprefix('-m ')}", flush=True)
    if wait_for([sys.executable, *command], cwd=folder, env=environment()):
        fail(f"{' '.join(command)} failed in the demo; its own message stands above")


def tell(folder: Path) -> None:
    """Make a project in `folder`, pretrain, transfer, compare."""
    print("DEMO 1 of 3: pretrain on 3,000 images of sloping stripes", flush=True)
    make_project(folder, 20, 20, merge(SETTINGS, PRETRAINING))
    write_stripes(folder / "slopes", 3000, 20, "slopes")
    run(folder, "-m", "dvc", "repro", "train@finetuned")
    model = load_params(str(folder / "params.yaml")).model
    trained = folder / model_path("finetuned")
    network = load_network(model, len(CLASSES), trained, torch.device("cpu"))
    save_weights(folder / WEIGHTS, network.backbone)

    print(
        "DEMO 2 of 3: transfer to 200 images of diamonds, with and without fine-tuning", flush=True
    )
    write_stripes(folder / "diamonds", 200, 1000, "diamonds")
    defaults = load_params(str(ROOT / "params.yaml")).train.finetuned.model_dump()
    finetuned = defaults | SMALL | {"start": "frozen"}
    train = {"shared": {"min_steps": 20}, "finetuned": finetuned}
    changes = {"data": {"source": "diamonds"}, "model": {"weights": WEIGHTS}, "train": train}
    set_params(folder, changes)
    run(folder, "-m", "dvc", "repro")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "transfer")

    print("DEMO 3 of 3: the same from scratch, as an experiment", flush=True)
    settings = ["model.weights=null", "train.finetuned.start=new"]
    settings += [f"train.finetuned.{key}={value}" for key, value in FROM_SCRATCH.items()]
    options = [f"-S{setting}" for setting in settings]
    run(folder, "-m", "dvc", "exp", "run", "--temp", "--name", "scratch", *options, "evaluate")
    run(folder, "-m", "tools.compare")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as folder:
        tell(Path(folder))
        with replacing(KEPT) as partial:
            partial.mkdir()
            for name in ("figures", "metrics"):
                shutil.copytree(Path(folder, name), partial / name)
    print(
        "The commit is the transfer; in the experiment scratch, finetuned is from scratch.\n"
        f"The figures and tables of the transfer are in {KEPT}/."
    )


if __name__ == "__main__":
    exit_cleanly(main)
