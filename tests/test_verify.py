"""What verify calls identical, within tolerance or different, and what it cannot compare."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, commit, dvc, git, make_project, python

from tools.verify import recipe

HASH = '("path": "{}", "hash": "md5", "md5": ")'
MODEL = HASH.format("models/frozen.safetensors")


@pytest.mark.parametrize(
    ("old", "new", "count", "same"),
    [
        (MODEL, r"\1f", 0, True),
        (MODEL, r"\1f", 1, False),
        (HASH.format("models/new.safetensors"), r"\1f", 0, False),
        (HASH.format("stages/evaluate.py"), r"\1f", 0, False),
        ("-m stages.render", "-m stages.other", 0, False),
        ('"seed": 0', '"seed": 1', 1, False),
    ],
)
def test_only_hashes_of_computed_results_may_differ_and_only_everywhere(old, new, count, same):
    stages = yaml.safe_load((ROOT / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    changed, changes = re.subn(old, new, json.dumps(stages), count=count)
    assert changes
    assert (recipe(json.loads(changed)) == recipe(stages)) == same


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A project with committed results that runs in half a minute."""
    folder = tmp_path_factory.mktemp("tiny") / "project"
    make_project(folder, 80, 40, **{"train.frozen.epochs": 1, "train.finetuned.epochs": 1})
    dvc(folder, "repro")
    commit(folder, "results")
    return folder


@pytest.mark.faults
@pytest.mark.parametrize(
    ("path", "old", "new", "status", "words"),
    [
        ("Makefile", r"\Z", "# a comment\n", 0, "IDENTICAL: "),
        ("dvc.lock", r"(models/frozen\S+\s+hash: md5\s+md5: ).{4}", r"\1ffff", 0, "WITHIN TOL"),
        ("metrics/evaluation.json", "(gain.: )", r"\g<1>1", 1,
         r"(?s)\n metrics/evaluation.json +\| .* 1 file changed.*\nDIFFERENT: "),
        ("dvc.lock", "(?s).+", "", 2, "error: .*dvc.lock"),
        ("params.yaml", "seed: 0", "seed: 1", 2, r"error: .*uncommitted .*\n M params.yaml"),
    ],
    ids=["identical", "another CPU", "an edited metric", "no dvc.lock", "uncommitted changes"],
)  # fmt: skip
def test_a_run_from_scratch_is_compared_with_what_was_committed(
    tiny, tmp_path, path, old, new, status, words
):
    folder = shutil.copytree(tiny, tmp_path / "project", symlinks=True)
    text = re.sub(old, new, (folder / path).read_text(encoding="utf-8"))
    (folder / path).write_text(text, encoding="utf-8")
    if not text:
        (folder / path).unlink()
    if "uncommitted" not in words:
        commit(folder, "changed")
    before = git(folder, "status", "--porcelain")
    done = python(folder, "-m", "tools.verify", TMPDIR=str(tmp_path))
    assert done.returncode == status, done.stderr
    assert re.search(words, done.stdout + done.stderr)
    assert git(folder, "status", "--porcelain") == before
    assert list(tmp_path.glob("verify-*")) == []
