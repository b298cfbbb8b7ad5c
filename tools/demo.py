"""The same pipeline on a small generated data set, in a temporary copy: no network, no weights."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from tools import synthetic

ROOT = Path(__file__).parents[1]
RESULTS = ("dvc.lock", "metrics/", "figures/")
SETTINGS = {
    "data": {"source": "stripes", "validation": 50},
    "model": {"weights": None, "image_size": 32},
    "train": {
        "device": "cpu",
        "batch_size": 32,
        "frozen": {"epochs": 6, "views": 2},
        "finetuned": {"epochs": 6},
    },
    "evaluate": {"batch_size": 16},
}


def merge(settings: dict, changes: dict) -> dict:
    """`settings` with `changes` in it; both may be nested."""
    return settings | {
        key: merge(settings[key], value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }


def make_project(
    folder: Path, train: int = 400, test: int = 200, settings: dict = SETTINGS
) -> None:
    """Copy the project without its results into `folder`, a Git repository of its own.

    `settings` are merged into its params.yaml; its data, in stripes/, is a generated set of
    `train` + `test` pictures.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if not name.startswith(RESULTS) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    document = yaml.safe_load((folder / "params.yaml").read_text())
    text = yaml.safe_dump(merge(document, settings), sort_keys=False)
    (folder / "params.yaml").write_text(text)
    synthetic.write(folder / "stripes", train, test)
    for command in ("init --quiet", "add --all", "commit --quiet --message generated"):
        identity = ["-c", "user.name=demo", "-c", "user.email=demo@localhost"]
        subprocess.run(["git", *identity, *command.split()], cwd=folder, check=True)


def environment() -> dict[str, str]:
    """This process's environment, with this Python first on PATH and without ASSETS_DIR."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {k: v for k, v in os.environ.items() if k != "ASSETS_DIR"} | {"PATH": path}


def run(folder: Path) -> None:
    """Make a project in `folder`, reproduce it, show its metrics."""
    notice = "DEMO on generated stripes: it shows how the pipeline runs; its numbers mean nothing."
    print(notice, flush=True)
    make_project(folder)
    for command in ("repro", "metrics show --md"):
        subprocess.run(
            [sys.executable, "-m", "dvc", *command.split()],
            cwd=folder,
            env=environment(),
            check=True,
        )
    print(notice)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        run(Path(folder))


if __name__ == "__main__":
    main()
