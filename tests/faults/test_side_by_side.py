"""Experiments that run at once do not disturb each other; processes that share one agree."""

import json
import re
import subprocess
import sys
import time

import pytest
from conftest import dvc, stage

from tools import demo
from transfer import params

SETTINGS = {"one": "train.frozen.views=1", "two": "train.frozen.head_lr=4e-3"}


def start(project, how: str) -> None:
    """Run both experiments of SETTINGS at the same time, as far as what they change."""
    commands = [
        ["exp", "run", how, "-n", name, "-S", setting, "train@frozen"]
        for name, setting in SETTINGS.items()
    ]
    if how == "--temp":
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "dvc", *command],
                cwd=project, env=demo.environment(), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for command in commands
        ]  # fmt: skip
        outputs = [child.communicate()[0] for child in children]
        assert [child.returncode for child in children] == [0, 0], outputs
        return
    for command in commands:
        dvc(project, *command)
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


def test_two_processes_come_within_a_point_of_one(tmp_path):
    """On stripes that are easy to tell apart, upright and level, where one is right always."""
    easy = demo.merge(
        demo.SETTINGS,
        {
            "train": {
                "threads": 1,
                "batch_size": 16,
                "frozen": {"epochs": 30, "views": 6},
                "finetuned": {"epochs": 25},
            }
        },
    )
    easy["data"]["classes"] = ["airplane", "dog"]
    easy["train"]["finetuned"]["first_size"] = 1.0
    demo.make_project(tmp_path, 2000, 500, easy)
    accuracies = []
    for launcher in ("python", '"torchrun --standalone --nproc-per-node=2"'):
        output = dvc(tmp_path, "exp", "run", "-S", f"train.launcher={launcher}", "evaluate")
        values = json.loads((tmp_path / "metrics/evaluation.json").read_text())
        accuracies.append([values[f"{mode}.accuracy"] for mode in params.MODES])
    assert len(re.findall(r"^> torchrun .* -m stages.train", output, re.MULTILINE)) == 2
    assert output.count("frozen epoch 30:") == 1  # only one of them logs
    alone, together = accuracies
    assert min(alone) > 0.95
    assert together == pytest.approx(alone, abs=0.01)
