"""What verify calls identical, within tolerance or different, and what it cannot compare."""

import json
import os
import re
import shutil
import signal
import time

import pytest
from helpers import ROOT, STAGES, commit, dvc, python, start

from tools import demo, verify
from tools.isolated import git

REFUSED = [  # a file that is removed, whether this is committed, what verify says
    ("params.yaml", False, "uncommitted changes; commit or stash them first:  D params.yaml"),
    (".git", False, "not a git repository"),
    ("dvc.lock", True, "dvc.lock: cannot be read: FileNotFoundError"),
    ("stripes", True, "dvc repro failed in the clone"),
]
ANOTHER_CPU = {"dvc.lock": (rb"(models/frozen\S+\s+hash: md5\s+md5: ).{4}", rb"\1ffff")}
ALTERED = {
    "figures/confusion.png": (rb"\Z", b"#"),
    "metrics/details.json": (b"(frozen.loss.: )", rb"\g<1>1"),
    "transfer/figures.py": (rb"\Z", b"#\n"),
}
NAMED = ["figures different", "lock: figures", "lock: metrics/details", "lock: transfer/figures.py"]
RUNS = [  # where in its repository, what is changed in it, the status, what the report says
    ("", {"params.yaml": (rb"\Z", b"# a comment\n")}, 0, [": identical", *STAGES]),
    ("deep/project", ANOTHER_CPU, 0, ["NOTICE"]),
    ("", ALTERED, 1, NAMED),
]
HASH = '("path": "{}", "hash": "md5", "md5": ")'
CHANGES = [  # of the committed results in all places or in one, the verdict, what is reported
    (HASH.format("models/frozen.safetensors"), r"\1f", 0, "within tolerance", "NOTICE"),
    (HASH.format("models/frozen.safetensors"), r"\1f", 1, "different", "evaluate.deps"),
    (HASH.format("data/prepared"), r"\1f", 0, "different", "data/prepared"),
    (HASH.format("models/new.safetensors"), r"\1f", 0, "different", "models/new"),
    (HASH.format("transfer/common"), r"\1f", 0, "different", "render.deps"),
    ("-m stages.render", "-m other", 1, "different", "render.cmd"),
    ('"figures": ', '"seed": 1, "figures": ', 1, "different", "render.params.params.yaml.seed"),
    ('accuracy": 0', 'accuracy": 1', 0, "different", "(?s)frozen.accuracy.*finetuned.accuracy"),
    ('"gain": ', '"gain": 1', 1, "different", "gain"),
    ('parameters": ', 'parameters": 1', 1, "different", "frozen.parameters"),
    (r'"frozen.loss": \S+ ', "", 1, "different", "frozen.loss +missing"),
    ('loss": ', 'loss": 1', 1, "identical", "frozen.loss"),
    ('machine.cpu": "', 'machine.cpu": "slow ', 1, "identical", "slow "),
]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """As in conftest.py, but with fewer images."""
    folder = tmp_path_factory.mktemp("reproduced")
    demo.make_project(folder, 80, 40)
    dvc(folder, "repro")
    commit(folder, "results")
    return folder


@pytest.mark.faults  # as all tests of a whole run: its project takes half a minute to make
@pytest.mark.parametrize(("path", "committed", "words"), REFUSED)
def test_what_cannot_be_compared_is_refused(project, tmp_path, path, committed, words):
    (shutil.rmtree if (project / path).is_dir() else os.unlink)(project / path)
    if committed:
        commit(project, "removed")
    done = python(project, "-m", "tools.verify", TMPDIR=str(tmp_path))
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]


@pytest.mark.faults
@pytest.mark.parametrize(("place", "edits", "status", "words"), RUNS)
def test_a_run_from_scratch(project, tmp_path, place, edits, status, words):
    folder = tmp_path / "whole" / place
    shutil.copytree(project, folder)
    os.rename(folder / ".git", tmp_path / "whole/.git")
    for path, (old, new) in edits.items():
        (folder / path).write_bytes(re.sub(old, new, (folder / path).read_bytes()))
    commit(folder, "changed")
    (folder.parent / "elsewhere.txt").touch()  # in the repository, but not in the project
    done = python(folder, "-m", "tools.verify", TMPDIR=str(tmp_path))
    assert done.returncode == status, done.stderr
    report = (folder / "verify.md").read_text(encoding="utf-8")
    assert done.stdout.endswith(f"{report}\n")
    assert [part for part in words if part not in " ".join(report.split())] == []
    assert git(folder, "status", "--porcelain", ".") == ""
    assert not list(tmp_path.glob("verify-*"))


@pytest.mark.parametrize(("old", "new", "count", "verdict", "words"), CHANGES)
def test_the_verdict_on_changed_results(old, new, count, verdict, words):
    made = verify.results(ROOT)
    changed, changes = re.subn(old, new, json.dumps(made), count=count)
    assert changes
    found, report = verify.compare(json.loads(changed), made, [], 0.01)
    assert found == verdict
    assert re.search(words, report)


def test_an_accuracy_may_differ_by_the_tolerance():
    assert verify.agree("frozen.accuracy", 0.80, 0.81, 0.01)
    assert not verify.agree("frozen.accuracy", 0.80, 0.8101, 0.01)


def test_costs_name_one_machine_for_all_stages_or_one_for_each():
    cost = {"a.seconds": 1, "a.machine.cpu": "y", "b.machine.cpu": "x", "b.machine.cores": 2}
    assert verify.machines(cost) == {"cpu": "x / y", "cores": "2"}


def test_a_report_that_cannot_be_kept_is_printed(tmp_path, capsys):
    (tmp_path / "file").touch()
    verify.publish("the report", tmp_path / "file/verify.md")
    out, errors = capsys.readouterr()
    assert out == "the report\n"
    assert re.fullmatch(r"error: .*verify\.md: cannot be written: .*\n", errors)


@pytest.mark.faults
@pytest.mark.parametrize(("to", "how"), [("kill", signal.SIGTERM), ("killpg", signal.SIGINT)])
def test_an_interrupted_run_leaves_nothing(project, tmp_path, to, how):
    options = {"variables": {"TMPDIR": str(tmp_path)}, "start_new_session": True}
    with start(project, "-m", "tools.verify", **options) as child:
        while not list(tmp_path.glob("verify-*/clone/data")):
            assert child.poll() is None
            time.sleep(0.05)
        getattr(os, to)(child.pid, how)  # Ctrl-C in a terminal reaches the whole group
        out, _ = child.communicate()  # whatever was started and still runs would hold `out` open
    assert child.returncode == 2
    assert not [*tmp_path.glob("verify-*"), *re.findall("stage 'train", out)]
