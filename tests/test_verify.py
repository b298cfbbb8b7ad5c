import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from helpers import STAGES, commit

from tools import verify
from tools.isolated import environment, git


def start(project, *arguments) -> subprocess.Popen:
    """Start `python -m tools.verify` in `project`, its temporary files in project/../scratch."""
    scratch = project.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "tools.verify", *arguments],
        cwd=project, env=environment() | {"TMPDIR": str(scratch)}, text=True,
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
        with pytest.raises(SystemExit) as ended:
            verify.main()
        assert list(scratch.iterdir()) == []
        return int(ended.value.code), *capfd.readouterr()

    return run


def edit(path, pattern: str, replacement: str, count: int = 0) -> None:
    text, changes = re.subn(pattern, replacement, path.read_text(encoding="utf-8"), count=count)
    assert changes
    path.write_text(text, encoding="utf-8")


def md5_in_lock(project, path: str) -> str:
    return re.search(rf"path: {path}\n\s+hash: md5\n\s+md5: (\w+)", lock(project).read_text())[1]


def lock(project):
    return project / "dvc.lock"


def test_the_same_results_again_are_certified_and_nothing_is_touched(run, project):
    before = git(project, "status", "--porcelain", "--ignored")
    cache = sorted((project / ".dvc/cache").rglob("*"))
    code, out, _ = run()
    assert code == 0, out
    certificate = json.loads((project / "verify.json").read_text())
    assert certificate["verdict"] == "identical"
    assert {o["verdict"] for o in certificate["outputs"]} == {"identical"}
    assert {o["stage"] for o in certificate["outputs"]} == set(STAGES)
    assert all(m["old"] == m["new"] for m in certificate["metrics"].values())
    assert certificate["verified_on"]["torch"]
    assert (project / "verify.md").read_text() in out
    for name in ("verify.json", "verify.md"):
        (project / name).unlink()
    assert git(project, "status", "--porcelain", "--ignored") == before
    assert sorted((project / ".dvc/cache").rglob("*")) == cache


@pytest.mark.faults
def test_a_hash_that_differs_with_the_same_accuracy_is_a_notice(run, project):
    old = md5_in_lock(project, "models/frozen.safetensors")
    edit(lock(project), old, "f" * 32)
    commit(project, "as if it came from another kind of CPU")
    code, out, _ = run()
    assert code == 0, out
    assert "NOTICE" in out
    outputs = json.loads((project / "verify.json").read_text())["outputs"]
    verdicts = {o["output"]: o["verdict"] for o in outputs}
    assert verdicts.pop("models/frozen.safetensors") == "within tolerance"
    assert set(verdicts.values()) == {"identical"}


@pytest.mark.faults
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
        ("transfer/model/heads.py", "2 \\* width", "width * 2", "transfer/model modified"),
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
    edit(lock(project), md5_in_lock(project, "data/prepared"), "1" * 32 + ".dir")
    commit(project, "edited in all places, but of a copied output")
    code, out, _ = run("--stage", "download")
    assert code == 1
    assert re.search(r"download +\| data/prepared +\| different", out)


def test_what_cannot_be_compared_is_said_and_nothing_stays(run, project, tmp_path):
    (project / "note.txt").write_text("?")
    for arguments, words in (
        ([], "note.txt"),
        (["--stage", "cook"], "--stage cook: dvc.lock has download"),
    ):
        code, _, err = run(*arguments)
        assert (code, words in err) == (2, True), err
        (project / "note.txt").unlink(missing_ok=True)
    git(project, "rm", "-rq", "stripes")
    commit(project, "no data")
    code, _, err = run("--stage", "download")
    assert code == 2
    assert "data.source = stripes: does not exist" in err or "stripes" in err
    assert "failed in the clone" in err
    git(project, "rm", "-q", "dvc.lock")
    commit(project, "no lock")
    code, _, err = run()
    assert code == 2
    assert "dvc.lock: is not committed" in err
    os.rename(project / ".git", tmp_path / "gone")
    code, _, err = run()
    assert code == 2
    assert "not a git repository" in err


def test_a_project_in_a_subfolder_and_with_other_line_ends_is_verified(
    project, tmp_path, monkeypatch, capfd
):
    """... of a larger repository with changes elsewhere, by someone whose Git makes CRLF."""
    whole = tmp_path / "larger"
    shutil.copytree(project, whole / "deep/project", ignore=shutil.ignore_patterns(".git", "cache"))
    (tmp_path / "gitconfig").write_text("[core]\n\tautocrlf = true\n")
    git(whole, "init", "--quiet")
    commit(whole, "all")
    (whole / "elsewhere.txt").write_text("not committed")
    monkeypatch.chdir(whole / "deep/project")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setattr(sys, "argv", ["verify", "--stage", "backbone"])
    with pytest.raises(SystemExit) as ended:
        verify.main()
    assert not ended.value.code, capfd.readouterr()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
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


@pytest.mark.parametrize(
    ("name", "old", "new", "good"),
    [
        ("frozen.accuracy", 0.8, 0.8, True),
        ("frozen.accuracy", 0.8, 0.809, True),
        ("frozen.accuracy", 0.8, 0.789, False),
        ("gain", 0.05, 0.07, False),
        ("frozen.loss", 1.0, 2.0, True),
        ("frozen.trainable", 10, 11, False),
        ("recall.frozen.accuracy", 0.5, 0.9, True),  # of classes with such names
        ("recall.frozen.x.trainable", 1, 2, True),
        ("recall.frozen.cat", 0.5, None, False),
    ],
)
def test_accuracies_have_the_tolerance_and_counts_have_none(name, old, new, good):
    values = {"old": old} | ({} if new is None else {"new": new})
    assert verify.within({name: values}, 0.01) is good


def test_a_class_with_the_marks_of_a_table_is_only_text():
    row = verify.table(("metric",), [("recall.a|b <script>`x`",)])
    assert r"a\|b &lt;script&gt;" in row
