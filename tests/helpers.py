"""What several test modules use."""

import csv
import pickle
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tools import demo
from tools.demo import set_params as set_params
from tools.isolated import environment, git
from transfer.common.errors import InputError
from transfer.common.settings import MODES

ROOT = Path(__file__).parents[1]
STAGES = ["download", "network", "train@frozen", "train@finetuned", "evaluate", "render"]


def start(folder: Path, *command: object, variables=None, **options) -> subprocess.Popen:
    """Start Python with `command` in `folder`, where no other repository or launcher is known.

    `variables` are added to its environment; what it prints can be read, unless `options` say where
    it goes.
    """
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


def dvc(folder: Path, *arguments: str, fails: bool = False, **variables: str) -> str:
    """Run real DVC in `folder`; what it printed."""
    with start(
        folder, "-m", "dvc", *arguments, variables=variables, stderr=subprocess.STDOUT
    ) as child:  # fmt: skip
        out, _ = child.communicate()
    assert (child.returncode != 0) == fails, out
    return out


def ran(output: str) -> list[str]:
    """The stages that DVC says it ran, in order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def stage(folder: Path, name: str, **variables: str) -> subprocess.CompletedProcess:
    """Run `python -m stages.NAME` in `folder`."""
    return python(folder, "-m", *f"stages.{name}".split(), **variables)


def per_class(folder: Path) -> dict[str, dict[str, float]]:
    """The recall of each class, by mode, in the results of `folder`."""
    with (folder / "metrics/per_class.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {mode: {row["class"]: float(row[mode]) for row in rows} for mode in MODES}


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


def refusal(action) -> str | None:
    """The one line with which `action` is refused, if it is."""
    message = None
    try:
        action()
    except InputError as error:
        message = str(error)
    assert "\n" not in (message or "")
    return message


def write_cifar10(folder: Path, train: int = 100, test: int = 40) -> Path:
    """A generated data set in CIFAR-10's own layout: `folder`/cifar-10-batches-py."""
    inside = folder / "cifar-10-batches-py"
    inside.mkdir(parents=True)
    for seed, (name, count) in enumerate({"data_batch_1": train, "test_batch": test}.items()):
        images, labels = demo.stripes(count, seed)
        rows = images.transpose(0, 3, 1, 2).reshape(count, -1)  # channel by channel
        (inside / name).write_bytes(pickle.dumps({"data": rows, "labels": labels}))
    (inside / "batches.meta").write_bytes(pickle.dumps({"label_names": demo.CLASSES}))
    return inside


def save_image(path: Path, *box: int, size=(60, 40), mode="RGB", colour="red", **options) -> None:
    """A white image with a `colour` rectangle at `box` (default: all of it)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, "white")
    left, top, right, bottom = box or (0, 0, *size)
    image.paste(Image.new(mode, (right - left, bottom - top), colour), (left, top))
    image.save(path, **options)
