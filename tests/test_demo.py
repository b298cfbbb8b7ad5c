"""The story of the demo, told as a user has it told."""

import pytest
from helpers import ROOT, python


@pytest.mark.faults
def test_transfer_beats_training_from_scratch_and_the_figures_stay(tmp_path):
    done = python(tmp_path, "-m", "tools.demo", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines()]
    frozen, finetuned, _ = map(
        float, next(line for line in words if line[:2] == ["the", "commit"])[2:5]
    )
    scratch = float(next(line for line in words if line[:1] == ["scratch"])[2])
    assert frozen > scratch + 10
    assert finetuned > scratch + 10
    assert (tmp_path / "demo/figures/first_batch.png").is_file()
    assert (tmp_path / "demo/metrics/evaluation.json").is_file()
