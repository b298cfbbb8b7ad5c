import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from conftest import commit

from tools import demo, verify


def start(project, *arguments) -> subprocess.Popen:
    """Start `python -m tools.verify` in `project`, its temporary files in project/../scratch."""
    scratch = project.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "tools.verify", *arguments],
        cwd=project, env=demo.environment() | {"TMPDIR": str(scratch)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def run(project, monkeypatch, capfd):
    """A function that verifies `project`: its exit status, standard output and standard error.

    Nothing may be left behind.
    """
    scratch = project.parent / "scratch"
    scratch.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["verify", *arguments])
        code = verify.main()
        if "--keep" not in arguments:
            assert list(scratch.iterdir()) == []
        return code, *capfd.readouterr()

    return run


def edit(path, pattern: str, replacement: str, count: int = 0) -> None:
    text, changes = re.subn(pattern, replacement, path.read_text(), count=count)
    assert changes
    path.write_text(text)


def md5_in_lock(project, path: str) -> str:
    return re.search(rf"path: {path}\n\s+hash: md5\n\s+md5: (\w+)", lock(project).read_text())[1]


def lock(project):
    return project / "dvc.lock"


def test_the_same_results_again_are_certified_and_nothing_is_touched(run, project):
    before = subprocess.check_output(["git", "status", "--porcelain", "--ignored"], cwd=project)
    cache = sorted((project / ".dvc/cache").rglob("*"))
    code, out, _ = run()
    assert code == 0, out
    certificate = json.loads((project / "verify.json").read_text())
    assert certificate["verdict"] == "identical"
    assert {o["verdict"] for o in certificate["outputs"]} == {"identical"}
    assert {o["stage"] for o in certificate["outputs"]} == {
        "download", "backbone", "train@frozen", "train@finetuned", "evaluate", "render",
    }  # fmt: skip
    assert all(m["difference"] == 0 for m in certificate["metrics"])
    assert certificate["verified_on"]["torch"]
    assert (project / "verify.md").read_text() in out
    for name in ("verify.json", "verify.md"):
        (project / name).unlink()
    assert before == subprocess.check_output(
        ["git", "status", "--porcelain", "--ignored"], cwd=project
    )
    assert sorted((project / ".dvc/cache").rglob("*")) == cache


def test_a_hash_that_differs_with_the_same_accuracy_is_a_notice(run, project):
    old = md5_in_lock(project, "models/frozen.safetensors")
    edit(lock(project), old, "f" * 32)
    commit(project, "as if it came from another kind of CPU")
    code, out, _ = run()
    assert code == 0, out
    assert "NOTICE" in out
    verdicts = {
        o["output"]: o["verdict"]
        for o in json.loads((project / "verify.json").read_text())["outputs"]
    }
    assert verdicts.pop("models/frozen.safetensors") == "within tolerance"
    assert set(verdicts.values()) == {"identical"}


def test_a_metric_typed_in_by_hand_is_caught_even_if_the_lock_is_made_to_fit(run, project):
    path = project / "metrics/evaluation.json"
    old = md5_in_lock(project, "metrics/evaluation.json")
    edit(path, r'"finetuned.accuracy": [\d.]+', '"finetuned.accuracy": 0.99')
    edit(lock(project), old, hashlib.md5(path.read_bytes()).hexdigest())
    commit(project, "a better result")
    code, out, _ = run("--stage", "evaluate")
    assert code == 1
    assert re.search(r"evaluate +\| metrics/evaluation.json +\| different", out)


@pytest.mark.parametrize(
    ("path", "pattern", "replacement", "words"),
    [
        ("metrics/evaluation.json", r'"gain": \S+', '"gain": 0.5,', "evaluation.json modified"),
        ("figures/confusion.png", None, None, "figures modified"),
        ("transfer/model.py", "width = 128", "width = 127", "transfer/model.py modified"),
        ("params.yaml", "batch_size: 32", "batch_size: 31", "params.yaml"),
        ("dvc.yaml", "python -m stages.render", "python -m stages.render -", "changed command"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_lock_is_caught(run, project, path, pattern, replacement, words):
    if pattern:
        edit(project / path, pattern, replacement, count=1)
    else:
        (project / path).write_bytes((project / path).read_bytes() + b"\0")
    commit(project, "changed, and not run again")
    code, out, err = run("--stage", "download")
    assert code == 1, err
    assert words in out


def test_a_lock_edited_by_hand_is_caught(run, project):
    old = md5_in_lock(project, "models/frozen.safetensors")
    edit(lock(project), old, "f" * 32, count=1)
    commit(project, "edited in one place")
    code, out, _ = run("--stage", "download")
    assert code == 1
    assert "two hashes" in out
    edit(lock(project), md5_in_lock(project, "data/cifar10"), "1" * 32 + ".dir")
    commit(project, "edited in all places, but of a copied output")
    code, out, _ = run("--stage", "download")
    assert code == 1
    assert re.search(r"download +\| data/cifar10 +\| different", out)


def test_what_cannot_be_compared_is_said_and_nothing_stays(run, project, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (project / "note.txt").write_text("?")
    for arguments, words in (
        ([], "note.txt"),
        (["--stage", "cook"], "--stage cook: dvc.lock has download"),
    ):
        code, _, err = run(*arguments)
        assert (code, words in err) == (2, True), err
        (project / "note.txt").unlink(missing_ok=True)
    subprocess.run(["git", "rm", "-rq", "stripes"], cwd=project, check=True)
    commit(project, "no data")
    code, _, err = run("--stage", "download")
    assert code == 2
    assert "MD5SUMS" in err
    assert "failed in the clone" in err
    subprocess.run(["git", "rm", "-q", "dvc.lock"], cwd=project, check=True)
    commit(project, "no lock")
    code, _, err = run()
    assert code == 2
    assert "dvc.lock: is not committed" in err
    os.rename(project / ".git", tmp_path / "gone")
    code, _, err = run()
    assert code == 2
    assert "not a git repository" in err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_cleans_up(project, how):
    scratch = project.parent / "scratch"
    with start(project) as child:
        while not list(scratch.glob("verify-*/clone/data")):
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(how)
        child.communicate(timeout=30)
    assert child.returncode != 0
    assert list(scratch.iterdir()) == []
    assert not (project / "verify.json").exists()


def test_the_clone_is_kept_on_request(run, project):
    code, out, _ = run("--keep", "--stage", "download")
    [clone] = (project.parent / "scratch").glob("verify-*/clone")
    assert code == 0
    assert f"The clone is kept in {clone}" in out
    assert "frozen.accuracy" not in out  # it was not measured again
    assert (clone / "data/cifar10/train_images.npy").exists()


def test_accuracies_have_the_tolerance_and_counts_have_none():
    old = {"frozen.accuracy": 0.8, "gain": 0.05, "frozen.loss": 1.0, "frozen.trainable": 10}
    for change, good in (
        ({}, True),
        ({"frozen.accuracy": 0.809}, True),
        ({"frozen.accuracy": 0.789}, False),
        ({"gain": 0.07}, False),
        ({"frozen.loss": 2.0}, True),
        ({"frozen.trainable": 11}, False),
    ):
        rows, verdict = verify.compare_metrics(old, old | change, 0.01)
        assert verdict is good
        assert [row["metric"] for row in rows] == list(old)
    assert not verify.compare_metrics(old, {"gain": 0.05}, 0.01)[1]
