"""What several test modules use."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from tools.isolated import environment, git
from transfer.common.errors import InputError
from transfer.common.params import load_params, merge

ROOT = Path(__file__).parents[1]
STAGES = ["download", "backbone", "train@frozen", "train@finetuned", "evaluate", "render"]


def dvc(folder: Path, *arguments: str, fails: bool = False, **variables: str) -> str:
    """Run real DVC in `folder`; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder, env=environment() | variables, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def ran(output: str) -> list[str]:
    """The stages that DVC says it ran, in order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def stage(folder: Path, name: str, **variables: str) -> subprocess.CompletedProcess:
    """Run `python -m stages.NAME` in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", *f"stages.{name}".split()],
        cwd=folder, env=environment() | variables, encoding="utf-8", capture_output=True,
    )  # fmt: skip


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file in `folder` and what it holds."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)


def edit(path: Path, old: str, new: str) -> None:
    """Replace `old`, which must be there, by `new` in the text file at `path`."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def set_params(folder: Path, changes: dict[str, Any]) -> None:
    """Make `changes` in the params.yaml of `folder`."""
    path = folder / "params.yaml"
    document = merge(load_params(str(path)).model_dump(), changes)
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")


def refusal(action) -> str | None:
    """The one line with which `action` is refused, if it is."""
    message = None
    try:
        action()
    except InputError as error:
        message = str(error)
    assert "\n" not in (message or "")
    return message


def save_image(path: Path, *box: int, size=(60, 40), mode="RGB", colour="red", **options) -> None:
    """A white image with a `colour` rectangle at `box` (default: all of it)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, "white")
    left, top, right, bottom = box or (0, 0, *size)
    image.paste(Image.new(mode, (right - left, bottom - top), colour), (left, top))
    image.save(path, **options)
