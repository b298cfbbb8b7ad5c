"""What several test modules use."""

import functools
import json
import operator
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from tools.demo import environment, write_images
from transfer.settings import InputError, Params

ROOT = Path(__file__).parents[1]
STAGES = ["download", "network", "train@frozen", "train@finetuned", "evaluate", "render"]
# What a project is made of, without its results.
PARTS = (
    ".dvc/.gitignore", ".dvc/config", ".dvc/page.html", ".dvc/plots", ".dvcignore",
    ".gitattributes", ".gitignore", "Makefile", "cifar10.md5", "dvc.yaml", "params.yaml",
    "requirements.txt", "stages", "tools", "transfer", "weights",
)  # fmt: skip
# Trains in seconds: 32 pixels, random weights, which must change further than pretrained ones.
SMALL = {
    "data.source": "stripes", "model.weights": None, "model.image_size": 32, "train.device": "cpu",
    "train.shared.batch_size": 32, "train.shared.min_steps": 1,
    "train.shared.validation_share": 0.125, "train.frozen.epochs": 6, "train.frozen.views": 2,
    "train.finetuned.epochs": 6, "train.finetuned.muon_lr": 0.02, "train.finetuned.head_lr": 5e-3,
    "train.finetuned.backbone_lr": 2e-3, "train.finetuned.weight_decay": 0.2,
    "train.finetuned.initial_scale": 0.5, "train.finetuned.batch_norm_until": 0.5,
    "figures.first_batch_size": 16,
}  # fmt: skip


def changed(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`document` with other values of some dotted keys."""
    document = json.loads(json.dumps(document))
    for key, value in changes.items():
        *above, name = key.split(".")
        functools.reduce(operator.getitem, above, document)[name] = value
    return document


def with_settings(params: Params, changes: dict[str, Any]) -> Params:
    return Params.model_validate(changed(params.model_dump(), changes))


def set_params(folder: Path, changes: dict[str, Any]) -> None:
    """Change dotted keys in the params.yaml of `folder`."""
    path = folder / "params.yaml"
    document = changed(yaml.safe_load(path.read_text(encoding="utf-8")), changes)
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def make_project(folder: Path, train: int = 400, test: int = 200, **settings: Any) -> None:
    """Copy the project without its results into `folder`, a Git repository of its own, with SMALL
    settings and generated images in stripes/.
    """
    for name in PARTS:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    set_params(folder, SMALL | settings)
    write_images(folder / "stripes", train, test)
    git(folder, "init", "--quiet")
    commit(folder, "generated")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)


def start(folder: Path, *command: object, variables=None, **options) -> subprocess.Popen:
    """Start Python with `command` in `folder`; `variables` are added to its environment."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder, env=environment() | (variables or {}), **(pipes | options),
    )  # fmt: skip


def python(folder: Path, *command: object, **variables: str) -> subprocess.CompletedProcess:
    """Run Python with `command` in `folder` to its end."""
    with start(folder, *command, variables=variables) as child:
        out, err = child.communicate()
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def stage(folder: Path, name: str, **variables: str) -> subprocess.CompletedProcess:
    """Run `python -m stages.NAME` in `folder`."""
    return python(folder, "-m", *f"stages.{name}".split(), **variables)


def dvc(folder: Path, *arguments: str, fails: bool = False, **variables: str) -> str:
    """Run real DVC in `folder`; what it printed."""
    done = python(folder, "-m", "dvc", *arguments, **variables)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def ran(output: str) -> list[str]:
    """The stages that DVC says it ran, in order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def edit(path: Path, old: str, new: str) -> None:
    """Replace `old`, which must be there, by `new` in the text file at `path`."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def refusal(action) -> str | None:
    """The one line with which `action` is refused, if it is."""
    message = None
    try:
        action()
    except InputError as error:
        message = str(error)
    assert "\n" not in (message or "")
    return message


def go_offline(monkeypatch, folder: Path) -> None:
    """No network, no ASSETS_DIR, and `folder` for torch's cache."""
    nothing = dict.fromkeys(("ASSETS_DIR", "no_proxy", "NO_PROXY"), "")
    refuses = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    for name, value in (nothing | refuses | {"TORCH_HOME": str(folder)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies


def save_image(path: Path, *box: int, size=(60, 40), mode="RGB", colour="red", **options) -> None:
    """A white image with a `colour` rectangle at `box` (default: all of it)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, "white")
    left, top, right, bottom = box or (0, 0, *size)
    image.paste(Image.new(mode, (right - left, bottom - top), colour), (left, top))
    image.save(path, **options)
