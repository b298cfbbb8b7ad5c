"""The story of the demo, told as a user has it told."""

import re

import pytest
from helpers import ROOT, python


@pytest.mark.faults
def test_transfer_beats_training_from_scratch_and_the_figures_stay(tmp_path):
    done = python(tmp_path, "-m", "tools.demo", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    [(frozen, finetuned)] = re.findall(r"^the commit +(\S+) +(\S+)", done.stdout, re.M)
    [scratch] = re.findall(r"^scratch +\S+ +(\S+)", done.stdout, re.M)
    assert float(frozen) > float(scratch) + 10
    assert float(finetuned) > float(scratch) + 10
    assert (tmp_path / "demo/figures/first_batch.png").is_file()
    assert (tmp_path / "demo/metrics/evaluation.json").is_file()
