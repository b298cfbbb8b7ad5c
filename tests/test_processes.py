"""Training on several processes, which torchrun starts, gives what one process gives."""

import json
import re

import pytest
from conftest import dvc

from transfer import params


def test_two_processes_come_within_a_point_of_one(project):
    """On stripes that are easy to tell apart, where one process is right almost always."""
    easy = [f"train.{mode}.epochs=25" for mode in params.MODES]
    easy += ["train.finetuned.first_size=1.0", "train.batch_size=16"]
    launcher = 'train.launcher="torchrun --standalone --nproc-per-node=2"'
    accuracies = []
    for settings in (easy, [*easy, launcher]):
        changes = [part for setting in settings for part in ("-S", setting)]
        output = dvc(project, "exp", "run", *changes, "evaluate")
        values = json.loads((project / "metrics/evaluation.json").read_text())
        accuracies.append([values[f"{mode}.accuracy"] for mode in params.MODES])
    assert len(re.findall(r"^> torchrun .* -m stages.train", output, re.MULTILINE)) == 2
    assert output.count("frozen epoch 25:") == 1  # only one of them logs
    alone, together = accuracies
    assert min(alone) > 0.95
    assert together == pytest.approx(alone, abs=0.01)
