"""Small generated data in CIFAR-10's own format, and the pipeline run on it once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tools import demo, synthetic
from transfer import params
from transfer.params import Params

torch.set_num_threads(1)
# Tests run side by side: a thread that waits must not keep a core busy.
os.environ["OMP_WAIT_POLICY"] = "passive"
ROOT = Path(__file__).parents[1]


def dvc(folder: Path, *arguments: str, fails: bool = False, **environment: str) -> str:
    """Run real DVC in `folder`; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder, env=demo.environment() | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def ran(output: str) -> list[str]:
    """The stages that DVC says it ran, in order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def stage(folder: Path, name: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `python -m stages.NAME` in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", *f"stages.{name}".split()],
        cwd=folder, env=demo.environment() | environment, text=True, capture_output=True,
    )  # fmt: skip


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file in `folder` and what it holds."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commit(folder: Path, message: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    subprocess.run(["git", *identity, "commit", "-qm", message], cwd=folder, check=True)


@pytest.fixture
def batches(tmp_path) -> Path:
    """A folder in CIFAR-10's layout with 100 training and 40 test pictures."""
    synthetic.write(tmp_path / "batches", 100, 40)
    return tmp_path / "batches"


@pytest.fixture
def settings() -> Params:
    """The demo's settings, on one thread."""
    document = params.load(str(ROOT / "params.yaml")).model_dump()
    return Params.model_validate(demo.merge(document, demo.SETTINGS))


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory, worker_id) -> Path:
    """The demo's project, in which `dvc repro` has run, its results committed.

    Made once for all the processes that run tests, which share it: only ever read it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "reproduced"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            code = (
                "import pathlib, sys; from tools import demo; demo.run(pathlib.Path(sys.argv[1]))"
            )
            with folder.with_suffix(".log").open("w") as log:
                subprocess.run(
                    [sys.executable, "-c", code, folder],
                    cwd=ROOT, env=demo.environment(), check=True, stdout=log, stderr=log,
                )  # fmt: skip
            commit(folder, "results")
    return folder


@pytest.fixture
def project(reproduced, tmp_path) -> Path:
    """A copy of `reproduced`, with its DVC cache, to do as one likes with."""
    folder = tmp_path / "project"
    subprocess.run(["cp", "-a", reproduced, folder], check=True)
    return folder
