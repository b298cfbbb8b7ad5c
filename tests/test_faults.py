"""Training that is stopped goes on and ends with the same bytes; processes that share one agree."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dvc.repo import Repo
from helpers import commit, dvc, git, python, set_params, stage, start, with_settings

from stages import train as training
from tools.demo import striped
from transfer.model import Network, save
from transfer.run import PREPARED, model_path, read_csv
from transfer.settings import MODES

pytestmark = pytest.mark.faults
if sys.platform == "win32":
    pytest.skip("Windows has neither SIGKILL nor limits", allow_module_level=True)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
DYING = {"train.launcher": "python dying.py"}
# Trains as stages.train does, but DIE names a mode, a function, in which call of it a signal comes,
# which, and whom it hits: the stage alone (kill) or, as Ctrl-C does, also DVC (killpg).
CODE = """
import os, signal, sys
from stages import train

mode, target, name, count, how, kill = [sys.argv[-1], *os.environ.get("DIE", "- - - - -").split()]
owner, calls = train.os if name == "replace" else train, []
function = getattr(owner, name, None)

def dying(*arguments):
    calls.append(name)
    if len(calls) == int(count):
        getattr(os, kill)({"kill": os.getpid, "killpg": os.getpgrp}[kill](), signal.Signals[how])
    return function(*arguments)

if mode == target:
    setattr(owner, name, dying)
sys.argv[1:] = [mode]  # without "-m stages.train", which dvc.yaml adds to a launcher
train.run_stage("train", train.main, ["frozen", "finetuned"])
"""


def results(folder: Path) -> dict[Path, bytes]:
    """The data, the models and the learning curves."""
    paths = [*folder.glob("data/*/*"), *folder.glob("models/*"), *folder.glob("metrics/curves/*")]
    return {path: path.read_bytes() for path in paths}


@pytest.fixture
def dying(project) -> Path:
    (project / "dying.py").write_text(CODE, encoding="utf-8")
    return project


def die(folder: Path, when: str, *command: str) -> str:
    """What `command` printed as an error before it was signalled."""
    with start(folder, *command, variables={"DIE": when}, start_new_session=True) as child:
        _, err = child.communicate()
    assert child.returncode != 0
    return err


@pytest.mark.parametrize(
    ("mode", "when", "kept"),
    [
        ("frozen", "write_checkpoint 1 SIGINT", 0),
        ("frozen", "replace 4 SIGKILL", 3),  # the checkpoint is written, but not in its place
        ("finetuned", "write_checkpoint 3 SIGTERM", 2),
        ("finetuned", "save 1 SIGKILL", 6),  # the curves are written, the model is not
    ],
)
def test_a_stopped_stage_goes_on_and_ends_with_the_same_bytes(dying, mode, when, kept):
    before = results(dying)
    for path in (f"models/{mode}.safetensors", f"metrics/curves/{mode}.csv"):
        (dying / path).unlink()
    err = die(dying, f"{mode} {when} kill", "dying.py", mode)
    assert err == ("error: interrupted\n" if "SIGINT" in when else "")
    out = stage(dying, f"train {mode}").stdout
    assert out.startswith(f"resuming after epoch {kept}," if kept else f"{mode} epoch 1:")
    assert results(dying) == before
    assert not list(dying.glob(".checkpoints/*"))


@pytest.mark.parametrize("when", ["frozen print_row 4 SIGINT", "finetuned replace 3 SIGKILL"])
def test_a_stopped_dvc_repro_goes_on_and_ends_with_the_same_bytes(dying, when):
    before = results(dying)
    set_params(dying, DYING)
    die(dying, f"{when} killpg", "-m", "dvc", "repro")
    assert len(results(dying)) < len(before)
    assert "resuming after epoch" in dvc(dying, "repro")
    assert results(dying) == before


def test_a_killed_experiment_in_a_temporary_copy_goes_on_in_the_next(dying):
    set_params(dying, DYING)
    commit(dying, "dying")
    command = ("-m", "dvc", "exp", "run", "--temp", "-Strain.frozen.head_lr=4e-3", "train@frozen")
    die(dying, "frozen write_checkpoint 4 SIGKILL killpg", *command)
    assert "resuming after epoch 3," in python(dying, *command).stdout
    assert not list(dying.glob(".checkpoints/*"))


def test_everything_that_decides_the_result_names_the_checkpoint(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setattr(training, "__file__", str(project / "stages/train.py"))

    def name(mode="frozen", device="cpu", processes=1):
        return training.checkpoint_path(mode, model_path("new"), torch.device(device), processes)

    names = [name(), name("finetuned"), name(device="cuda"), name(processes=2)]
    assert name() == names[0]
    code = [Path("stages/train.py"), *Path("transfer").glob("*.py")]
    for path in (Path("params.yaml"), model_path("new"), *PREPARED.iterdir(), *code):
        content = path.read_bytes()
        path.unlink()  # it may be a link into DVC's cache
        path.write_bytes(content + b"\n")
        names.append(name())
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    assert len({*names, name()}) == len(names) + 1


def test_two_processes_come_within_a_point_of_one(project, params, monkeypatch):
    """On stripes that are easy to tell apart, upright and level, where one is right always."""
    monkeypatch.chdir(project)
    (PREPARED / "train_keys.npy").unlink()
    images, labels = striped(2400, seed=1)
    np.save(PREPARED / "train_images.npy", images[labels % 9 == 0])
    np.save(PREPARED / "train_labels.npy", labels[labels % 9 == 0] // 9)
    changes = {
        "model.batch_norm_momentum": 0.5, "train.threads": 1, "train.shared.batch_size": 16,
        "train.shared.validation_share": 0.5, "train.frozen.epochs": 12,
        "train.finetuned.initial_scale": 1.0,
    }  # fmt: skip
    set_params(project, changes)
    torch.manual_seed(0)
    save(Network(with_settings(params, changes).model, ["upright", "level"]), model_path("new"))
    for mode in MODES:
        accuracies = []
        for launcher in ([], TORCHRUN):
            done = python(project, *launcher, "-m", "stages.train", mode)
            assert done.stdout.count(f"{mode} epoch 6:") == 1, done.stderr  # only one prints
            last = read_csv(Path(f"metrics/curves/{mode}.csv"))[-1]
            accuracies.append(float(last["validation_accuracy"]))
        assert accuracies[0] > 0.97
        assert accuracies[1] == pytest.approx(accuracies[0], abs=0.01)  # 2 of 240 images


def test_an_error_of_several_processes_is_a_line(project):
    set_params(project, {"train.shared.batch_size": 31})
    done = python(project, *TORCHRUN, "-m", "stages.train", "frozen")
    assert done.returncode != 0
    assert "\nerror: train.shared.batch_size = 31, " in f"\n{done.stderr}"
    assert "stages/train.py" not in done.stderr


def test_a_full_disk_is_a_line_and_the_earlier_results_come_back(project):
    """A limit on the size of a file stands for the disk."""
    import resource

    before, limit = results(project), (2**21, 2**21)
    set_params(project, {"model.image_size": 96})
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)}
    with start(project, "-m", "dvc", "repro", **limited) as child:
        _, err = child.communicate()
    assert child.returncode != 0
    assert [line[:6] for line in err.splitlines()] == ["error:", "ERROR:"]  # the latter of DVC
    git(project, "restore", ".")
    with Repo(str(project)) as repo:
        repo.checkout(force=True)  # over what is half written
    assert results(project) == before
