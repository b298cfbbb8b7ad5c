"""Training that is stopped, however and whenever, goes on and ends with the same bytes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import commit, dvc, edit, stage, start

from tools import demo
from transfer.common.settings import MODES, merge
from transfer.training import checkpoint

pytestmark = pytest.mark.faults
if sys.platform == "win32":
    pytest.skip("Windows has neither SIGKILL nor process groups", allow_module_level=True)
EPOCHS = 20  # so many that a kill does not come too late on a busy machine


def results(folder: Path, mode: str) -> dict[str, bytes]:
    """What training in `mode` leaves behind."""
    paths = [folder / f"models/{mode}.safetensors", *(folder / f"metrics/curves/{mode}").rglob("*")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file()}


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory) -> Path:
    """As in conftest.py, but trained for EPOCHS."""
    folder = tmp_path_factory.mktemp("reproduced")
    epochs = {"epochs": EPOCHS}
    longer = merge(demo.SETTINGS, {"train": dict.fromkeys(MODES, epochs)})
    demo.make_project(folder, settings=longer)
    dvc(folder, "repro")
    commit(folder, "results")
    return folder


@pytest.fixture
def fresh(project) -> Path:
    """A project whose training has not run yet, though dvc.lock says what it gives."""
    for mode in MODES:
        (project / f"models/{mode}.safetensors").unlink()
        shutil.rmtree(project / f"metrics/curves/{mode}")
    return project


def begin(folder: Path, *command: str) -> subprocess.Popen:
    """Start `python -m COMMAND` in a process group of its own.

    DVC runs stages in SHELL, and a plain sh may stay between it and the stage.
    """
    return start(
        folder, "-m", *command, variables={"SHELL": "/bin/sh"}, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def wait_for(child: subprocess.Popen, words: str) -> str:
    """What `child` prints up to a line that holds `words`."""
    seen = ""
    for line in child.stdout:
        seen += line
        if words in line:
            return seen
    raise AssertionError(f"{words!r} was not printed:\n{seen}")


def resumed_after(output: str) -> int:
    return int(re.search(r"resuming after epoch (\d+)", output)[1])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("mode", MODES)
def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes(reproduced, fresh, mode, how):
    with begin(fresh, "stages.train", mode) as child:
        wait_for(child, f"{mode} epoch 3:")
        child.send_signal(how)
        rest = child.stdout.read()
    assert child.returncode
    assert "Traceback" not in rest
    assert not (fresh / f"models/{mode}.safetensors").exists()
    done = stage(fresh, f"train {mode}")
    assert done.returncode == 0, done.stderr
    assert resumed_after(done.stdout) >= 2  # epoch 3 was printed before it was kept
    assert results(fresh, mode) == results(reproduced, mode)
    assert list((fresh / ".checkpoints").iterdir()) == []


@pytest.mark.parametrize("moment", ["at the start", "while it keeps an epoch", "when all is done"])
def test_the_moment_does_not_matter(reproduced, fresh, moment):
    with begin(fresh, "stages.train", "frozen") as child:
        if moment == "at the start":
            time.sleep(1)
        elif moment == "when all is done":
            wait_for(child, f"frozen epoch {EPOCHS}:")
        else:
            while not list((fresh / ".checkpoints").glob(".partial-*")):
                assert child.poll() is None
        child.kill()
    assert stage(fresh, "train frozen").returncode == 0
    assert results(fresh, "frozen") == results(reproduced, "frozen")


@pytest.mark.parametrize("whom", ["dvc alone", "everything"])
def test_a_killed_dvc_repro_goes_on(reproduced, fresh, whom):
    with begin(fresh, "dvc", "repro", "train@finetuned") as child:
        wait_for(child, "finetuned epoch 3:")
        kill = os.killpg if whom == "everything" else os.kill
        kill(child.pid, signal.SIGKILL)
        child.stdout.read()  # until the stage has ended, too: nothing may go on unseen
    output = dvc(fresh, "repro")
    assert resumed_after(output) >= 2
    assert results(fresh, "finetuned") == results(reproduced, "finetuned")
    assert "up to date" in dvc(fresh, "status")


def test_a_damaged_checkpoint_is_noticed_and_ignored(reproduced, fresh, capsys):
    with begin(fresh, "stages.train", "frozen") as child:
        wait_for(child, "frozen epoch 3:")
        child.kill()
    [path] = (fresh / ".checkpoints").glob("frozen-*")
    content = path.read_bytes()
    assert len(checkpoint.load(path)["rows"]) >= 2
    for damaged in (
        b"",
        content[:20],
        content[:-1],
        content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    ):
        path.write_bytes(damaged)
        assert checkpoint.load(path) is None
        assert f"{path}: is damaged and ignored" in capsys.readouterr().err
    done = stage(fresh, "train frozen")
    assert f"{path}: is damaged and ignored" in done.stderr
    assert "resuming" not in done.stdout
    assert results(fresh, "frozen") == results(reproduced, "frozen")


def test_everything_that_decides_the_result_names_the_checkpoint(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    monkeypatch.setattr(checkpoint, "CODE", fresh / "transfer")
    inputs = [Path("params.yaml"), Path("models/backbone.safetensors"), Path("data/prepared")]
    original = checkpoint.checkpoint_path("frozen", inputs)
    assert checkpoint.checkpoint_path("frozen", inputs) == original
    others = [
        checkpoint.checkpoint_path("finetuned", inputs),
        checkpoint.checkpoint_path("frozen", inputs, 2),
    ]
    for path in (*inputs[:2], inputs[2] / "train_images.npy", Path("transfer/figures.py")):
        content = path.read_bytes()
        path.unlink()  # it may be a link into DVC's cache
        path.write_bytes(content + b"\n")
        others.append(checkpoint.checkpoint_path("frozen", inputs))
        path.write_bytes(content)
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    others.append(checkpoint.checkpoint_path("frozen", inputs))
    assert len({original, *others}) == 1 + len(others)


def test_other_settings_start_anew(fresh):
    with begin(fresh, "stages.train", "frozen") as child:
        wait_for(child, "frozen epoch 3:")
        child.kill()
    edit(fresh / "params.yaml", "label_smoothing: 0.1", "label_smoothing: 0.0")
    done = stage(fresh, "train frozen")
    assert done.returncode == 0
    assert "resuming" not in done.stdout


def test_a_killed_experiment_in_a_temporary_copy_goes_on_in_the_next(fresh):
    command = ["exp", "run", "--temp", "-S", "train.finetuned.head_lr=4e-3", "train@finetuned"]
    with begin(fresh, "dvc", *command) as child:
        wait_for(child, "finetuned epoch 3:")
        os.killpg(child.pid, signal.SIGKILL)
        child.stdout.read()
    assert resumed_after(dvc(fresh, *command)) >= 2
    assert list((fresh / ".checkpoints").iterdir()) == []
