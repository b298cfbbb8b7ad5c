"""Training that is stopped, however and whenever, goes on and ends with the same bytes."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import commit, dvc, stage, start

from tools import demo
from transfer.common.settings import MODES, merge
from transfer.training import checkpoint

pytestmark = pytest.mark.faults
if sys.platform == "win32":
    pytest.skip("Windows has neither SIGKILL nor process groups", allow_module_level=True)
EPOCHS = {"frozen": 20, "finetuned": 10}  # so many that a kill in the third is not too late
STATES = ".checkpoints/f*"  # named as modes; a killed process may also leave a .partial-...
RESUMED = r"resuming after epoch ([2-9]|\d\d),"  # not 3: it is printed before it is kept


def results(folder: Path, mode: str) -> dict[str, bytes]:
    """What training in `mode` leaves behind."""
    paths = (f"models/{mode}.safetensors", f"metrics/curves/{mode}.csv")
    return {path: (folder / path).read_bytes() for path in paths}


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory) -> Path:
    """As in conftest.py, but trained longer."""
    folder = tmp_path_factory.mktemp("reproduced")
    longer = {"train": {mode: {"epochs": count} for mode, count in EPOCHS.items()}}
    demo.make_project(folder, settings=merge(demo.SETTINGS, longer))
    dvc(folder, "repro")
    commit(folder, "results")
    return folder


@pytest.fixture
def fresh(project) -> Path:
    """A project whose training has not run yet, though dvc.lock says what it gives."""
    for mode in MODES:
        (project / f"models/{mode}.safetensors").unlink()
        (project / f"metrics/curves/{mode}.csv").unlink()
    return project


def stop(folder: Path, command: str, moment: str, how=signal.SIGKILL, kill=os.kill) -> int:
    """Run `python -m COMMAND` and signal it when it prints `moment`, or when there is such a path;
    its exit status, when all that it started has ended, too.
    """
    with start(
        folder, "-m", *command.split(), stderr=subprocess.STDOUT, start_new_session=True,
        variables={"SHELL": "/bin/sh"},  # it may stay between DVC and the stage
    ) as child:  # fmt: skip
        printed = ""
        while moment not in printed and not list(folder.glob(moment)):
            assert child.poll() is None, printed
            printed += "" if "*" in moment else child.stdout.readline()
        kill(child.pid, how)
        assert "Traceback" not in child.stdout.read()
    return child.returncode


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_stage_goes_on_and_ends_with_the_same_bytes(reproduced, fresh, mode, how):
    if mode == "finetuned":  # starts from this
        shutil.copy(reproduced / "models/frozen.safetensors", fresh / "models")
    assert stop(fresh, f"stages.train {mode}", f"{mode} epoch 3:", how)
    assert re.search(RESUMED, stage(fresh, f"train {mode}").stdout)
    assert results(fresh, mode) == results(reproduced, mode)
    assert not list(fresh.glob(STATES))


@pytest.mark.parametrize("moment", ["epoch 1:", ".check*/.partial-*", "epoch 20:"])
def test_the_moment_does_not_matter(reproduced, fresh, moment):
    """After the first epoch, while it keeps an epoch, when all epochs are done."""
    stop(fresh, "stages.train frozen", moment)
    assert stage(fresh, "train frozen").returncode == 0
    assert results(fresh, "frozen") == results(reproduced, "frozen")


@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_a_killed_dvc_repro_goes_on(reproduced, fresh, kill):
    """When DVC alone is killed, and when everything is."""
    stop(fresh, "dvc repro train@finetuned", "finetuned epoch 3:", kill=kill)
    assert re.search(RESUMED, dvc(fresh, "repro"))
    assert results(fresh, "finetuned") == results(reproduced, "finetuned")
    assert "up to date" in dvc(fresh, "status")


def test_a_killed_experiment_in_a_temporary_copy_goes_on_in_the_next(fresh):
    command = "exp run --temp -S train.finetuned.head_lr=4e-3 train@finetuned"
    stop(fresh, f"dvc {command}", "finetuned epoch 3:", kill=os.killpg)
    assert re.search(RESUMED, dvc(fresh, *command.split()))
    assert not list(fresh.glob(STATES))


def test_a_damaged_checkpoint_is_noticed_and_ignored(reproduced, fresh, capsys):
    stop(fresh, "stages.train frozen", "frozen epoch 3:")
    [path] = (fresh / ".checkpoints").glob("frozen-*")
    content = path.read_bytes()
    assert len(checkpoint.load(path)["rows"]) >= 2
    for damaged in (b"", content[:20], content[:-1], bytes([*content[:-1], content[-1] ^ 1])):
        path.write_bytes(damaged)
        assert checkpoint.load(path) is None
        assert f"{path}: is damaged and ignored" in capsys.readouterr().err
    done = stage(fresh, "train frozen")
    assert f"{path}: is damaged and ignored" in done.stderr
    assert results(fresh, "frozen") == results(reproduced, "frozen")


def test_everything_that_decides_the_result_names_the_checkpoint(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr(checkpoint, "CODE", project / "transfer")
    inputs = [Path("params.yaml"), Path("models/new.safetensors"), Path("data/prepared")]
    name = functools.partial(checkpoint.checkpoint_path, "frozen", inputs)
    names = [name(), name(2), checkpoint.checkpoint_path("finetuned", inputs)]
    assert name() == names[0]
    for path in (*inputs[:2], inputs[2] / "train_images.npy", Path("transfer/figures.py")):
        content = path.read_bytes()
        path.unlink()  # it may be a link into DVC's cache
        path.write_bytes(content + b"\n")
        names.append(name())
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    assert len({*names, name()}) == len(names) + 1
