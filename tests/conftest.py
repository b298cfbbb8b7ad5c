"""Small generated data, and the pipeline run on them once."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import ROOT, SMALL, commit, make_project, start, with_settings

from tools.demo import striped
from transfer.data import Split
from transfer.settings import Params, load_params

torch.set_num_threads(1)
# Tests run side by side: a thread that waits must not keep a core busy.
os.environ["OMP_WAIT_POLICY"] = "passive"


@pytest.fixture(scope="session")
def stripes() -> Split:
    """340 generated training images of 10 classes, equally many of each."""
    images, labels = striped(340, seed=1)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


@pytest.fixture(scope="session")
def params() -> Params:
    """The small settings."""
    return with_settings(load_params(str(ROOT / "params.yaml")), SMALL)


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory, worker_id) -> Path:
    """A small project in which `dvc repro` has run, its results committed.

    Made once for all the processes that run tests, which share it: only ever read it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "reproduced"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = Path(tempfile.mkdtemp(dir=folder.parent), "made")
            make_project(made)
            with folder.with_suffix(".log").open("w") as log:
                child = start(made, "-m", "dvc", "repro", stdout=log, stderr=subprocess.STDOUT)
                assert child.wait() == 0, folder.with_suffix(".log").read_text()
            commit(made, "results")
            made.rename(folder)  # if it failed, the next one to need it fails likewise
    return folder


@pytest.fixture
def project(reproduced, tmp_path) -> Path:
    """A copy of `reproduced`, with its DVC cache, that a test may change."""
    return shutil.copytree(reproduced, tmp_path / "project", symlinks=True)
