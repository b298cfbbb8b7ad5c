"""Experiments that run at once do not disturb each other; processes that share one agree."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import dvc, edit, stage, start

from tools import demo
from transfer.common.settings import MODES, merge

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform == "win32", reason="torchrun and queues: not on Windows"),
]
EXPERIMENTS = {"one": "train.frozen.views=1", "two": "train.frozen.head_lr=4e-3"}
TWO = 'train.launcher="torchrun --standalone --nproc-per-node=2"'


def run_at_once(project, how: str) -> None:
    """Run both EXPERIMENTS at the same time, as far as what they change."""
    commands = [
        ["-m", "dvc", "exp", "run", how, "-n", name, "-S", setting, "train@frozen"]
        for name, setting in EXPERIMENTS.items()
    ]
    children = [start(project, *command, stderr=subprocess.STDOUT) for command in commands]
    outputs = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    if how == "--queue":
        dvc(project, "queue", "start", "--jobs", "2")
        while "Running" in (status := dvc(project, "queue", "status")) or "Queued" in status:
            time.sleep(1)
        assert status.count("Success") == 2, status


@pytest.mark.parametrize("how", ["--temp", "--queue"])
def test_each_gets_the_result_that_it_gets_alone(project, how):
    run_at_once(project, how)
    for name in EXPERIMENTS:
        dvc(project, "exp", "apply", name)
        path = project / "models/frozen.safetensors"
        together = path.read_bytes()
        path.unlink()
        assert stage(project, "train frozen").returncode == 0
        assert path.read_bytes() == together
    assert not list(project.glob(".checkpoints/*"))


@pytest.mark.timeout(600)  # trains four models
def test_two_processes_come_within_a_point_of_one(tmp_path):
    """On stripes that are easy to tell apart, upright and level, where one is right always."""
    easy = {
        "data": {"classes": ["airplane", "dog"]},
        "train": {
            "threads": 1,
            "shared": {"batch_size": 16},
            "frozen": {"epochs": 30, "views": 6},
            "finetuned": {"epochs": 25, "initial_scale": 1.0},
        },
    }
    demo.make_project(tmp_path, 2000, 1500, merge(demo.SETTINGS, easy))  # a point: 3 of 300 images
    accuracies = []
    for launcher in ("train.launcher=python", TWO):
        output = dvc(tmp_path, "exp", "run", "-S", launcher, "evaluate")
        values = json.loads((tmp_path / "metrics/evaluation.json").read_text())
        accuracies.append([values[f"{mode}.accuracy"] for mode in MODES])
    assert len(re.findall(r"^> torchrun .* -m stages.train", output, re.MULTILINE)) == 2
    assert output.count("frozen epoch 30:") == 1  # only one of them logs
    alone, together = accuracies
    assert min(alone) > 0.95
    assert together == pytest.approx(alone, abs=0.01 + 1e-9)


def test_an_error_of_several_processes_stands_once_at_the_end(project):
    edit(project / "params.yaml", "batch_size: 32", "batch_size: 31")
    output = dvc(project, "exp", "run", "-S", TWO, "train@frozen", fails=True)
    assert output.count("error: train.shared.batch_size = 31: the 2 processes") == 1, output
    assert "Traceback (most recent call last):\n  File" not in output.partition("error: ")[2]


JOIN = """
import datetime, torch
from transfer.common.run import run_stage
from transfer.training import processes

processes.TIMEOUT = datetime.timedelta(seconds=SECONDS)
print("joins", flush=True)
run_stage("joining", lambda: processes.join(torch.device("cpu")), torchrun=True)
"""
AROUND = {
    "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("how", "seconds"), [(None, 2), (signal.SIGTERM, 600), (signal.SIGINT, 600)]
)
def test_a_process_that_waits_for_others_says_so_and_can_be_ended(project, how, seconds):
    code = JOIN.replace("SECONDS", str(seconds))
    with start(project, "-c", code, variables=AROUND) as child:
        assert child.stdout.readline() == "joins\n"
        if how:
            time.sleep(2)  # now it waits; a signal before that ends it at once
            child.send_signal(how)
        _, err = child.communicate()
    assert child.returncode
    if not how:
        assert "error: torchrun: waited for 2 processes at 127.0.0.1:0" in err.splitlines()[-1]


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "4", "RANK": "0"}, {"WORLD_SIZE": "1"}])
@pytest.mark.parametrize("name", ["evaluate", "train frozen"])
def test_the_environment_of_another_launcher_does_not_count(project, name, variables):
    around = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"} | variables
    done = stage(project, name, **around)
    assert done.returncode == 0, done.stderr
