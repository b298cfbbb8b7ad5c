"""Experiments that run at once in temporary copies of the project do not disturb each other."""

import subprocess
import sys
import time

import pytest
from conftest import dvc, stage

from tools import demo

SETTINGS = {"one": "train.frozen.views=1", "two": "train.frozen.head_lr=4e-3"}


def start(project, how: str) -> None:
    """Run both experiments of SETTINGS at the same time, to the end."""
    if how == "--temp":
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "dvc", "exp", "run", "--temp", "-n", name, "-S", setting],
                cwd=project, env=demo.environment(), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for name, setting in SETTINGS.items()
        ]  # fmt: skip
        outputs = [child.communicate()[0] for child in children]
        assert [child.returncode for child in children] == [0, 0], outputs
        return
    for name, setting in SETTINGS.items():
        dvc(project, "exp", "run", "--queue", "-n", name, "-S", setting)
    dvc(project, "queue", "start", "--jobs", "2")
    while "Running" in (status := dvc(project, "queue", "status")) or "Queued" in status:
        time.sleep(1)
    assert status.count("Success") == 2, status


@pytest.mark.parametrize("how", ["--temp", "--queue"])
def test_each_gets_the_result_that_it_gets_alone(project, how):
    start(project, how)
    for name in SETTINGS:
        dvc(project, "exp", "apply", name)
        path = project / "models/frozen.safetensors"
        together = path.read_bytes()
        path.unlink()
        assert stage(project, "train frozen").returncode == 0
        assert path.read_bytes() == together
    assert not list(project.glob(".checkpoints/*"))
