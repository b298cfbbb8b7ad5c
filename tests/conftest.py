"""Small generated data in CIFAR-10's own format, and the pipeline run on it once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import ROOT, commit

from tools import demo, synthetic
from tools.isolated import environment
from transfer.common.arrays import Split
from transfer.common.params import Params, load_params
from transfer.sources.cifar10 import read_batches

torch.set_num_threads(1)
# Tests run side by side: a thread that waits must not keep a core busy.
os.environ["OMP_WAIT_POLICY"] = "passive"


@pytest.fixture
def batches(tmp_path) -> Path:
    """A folder in CIFAR-10's layout with 100 training and 40 test images."""
    synthetic.write(tmp_path / "batches", 100, 40)
    return tmp_path / "batches"


@pytest.fixture(scope="session")
def stripes(tmp_path_factory) -> Split:
    """340 generated training images."""
    folder = tmp_path_factory.mktemp("data") / "stripes"
    synthetic.write(folder, 340, 20)
    return read_batches(folder, folder / "MD5SUMS")[0]["train"]


@pytest.fixture
def params() -> Params:
    """The demo's settings."""
    return load_params(str(ROOT / "params.yaml")).changed(demo.SETTINGS)


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
                    cwd=ROOT, env=environment(), check=True, stdout=log, stderr=log,
                )  # fmt: skip
            commit(folder, "results")
    return folder


@pytest.fixture
def project(reproduced, tmp_path) -> Path:
    """A copy of `reproduced`, with its DVC cache, to do as one likes with."""
    return shutil.copytree(reproduced, tmp_path / "project", symlinks=True)
