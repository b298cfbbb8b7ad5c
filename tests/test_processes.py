"""Experiments that run at once do not disturb each other; processes that share one agree."""

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import dvc, stage, start
from safetensors.torch import save_file

from tools import demo
from transfer.common.settings import MODES, merge
from transfer.model import classifier, cut

pytestmark = [pytest.mark.faults, pytest.mark.skipif(sys.platform == "win32", reason="no queue")]
EXPERIMENTS = {"one": "train.frozen.views=1", "two": "train.frozen.head_lr=4e-3"}
TWO = 'train.launcher="torchrun --standalone --nproc-per-node=2"'


@pytest.mark.parametrize("how", ["--temp", "--queue"])
def test_experiments_at_once_get_the_results_that_they_get_alone(project, how):
    commands = [f"exp run {how} -n {n} -S {s} train@frozen" for n, s in EXPERIMENTS.items()]
    children = [start(project, "-m", "dvc", *c.split(), stderr=subprocess.STDOUT) for c in commands]
    outputs = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    if how == "--queue":
        dvc(project, "queue", "start", "--jobs", "2")
        while re.search("Running|Queued", status := dvc(project, "queue", "status")):
            time.sleep(1)
        assert status.count("Success") == 2, status
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
        values = json.loads((tmp_path / "metrics/evaluation.json").read_text(encoding="utf-8"))
        accuracies.append([values[f"{mode}.accuracy"] for mode in MODES])
    assert len(re.findall(r"^> torchrun .* -m stages.train", output, re.MULTILINE)) == 2
    assert output.count("frozen epoch 30:") == 1  # only one of them logs
    alone, together = accuracies
    assert min(alone) > 0.95
    assert together == pytest.approx(alone, abs=0.01 + 1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.shared.batch_size=31", "train.shared.batch_size = 31: the 2 processes"),
        ("model.weights=weights/huge.safetensors", "frozen epoch 1/6: the loss is not finite"),
    ],
)
def test_an_error_of_several_processes_stands_once_at_the_end(project, change, message):
    state = cut(classifier("mobilenet_v3_small"), 5).state_dict()
    huge = {key: 1e30 * value if value.ndim == 4 else value for key, value in state.items()}
    save_file(huge, project / "weights/huge.safetensors")
    output = dvc(project, "exp", "run", "-S", TWO, "-S", change, "train@frozen", fails=True)
    assert output.count(f"error: {message}") == 1, output
    assert "Traceback (most recent call last):\n  File" not in output.partition("error: ")[2]


JOIN = """
import datetime, torch
from transfer.common.run import run_stage
from transfer.training import processes
processes.TIMEOUT = datetime.timedelta(seconds=SECONDS)
run_stage("joining", lambda: processes.join(torch.device("cpu")), torchrun=True)
"""


@pytest.mark.parametrize("how", [None, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_waits_for_others_ends_in_time_or_when_it_is_told_to(project, how):
    around = dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_PORT"), "0") | {
        "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"
    }  # fmt: skip
    code = JOIN.replace("SECONDS", "600" if how else "2")
    with start(project, "-c", code, variables=around) as child:
        if how:
            while "LISTEN" not in str(psutil.Process(child.pid).net_connections()):
                assert child.poll() is None
                time.sleep(0.1)
            child.send_signal(how)
        _, err = child.communicate()
    assert child.returncode
    assert ("error: torchrun: waited for 2 processes at 127.0.0.1:0" in err) == (not how)


@pytest.mark.parametrize("name", ["evaluate", "train frozen"])
def test_the_environment_of_another_launcher_does_not_count(project, name):
    around = {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    done = stage(project, name, **around)
    assert done.returncode == 0, done.stderr
