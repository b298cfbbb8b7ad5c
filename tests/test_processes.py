"""Training on several processes, which torchrun starts, gives what one process gives."""

import json
import re

from conftest import dvc

from transfer import params


def test_two_processes_come_within_a_point_of_one(project):
    """On stripes that are easy to tell apart, where one process is right almost always."""
    easy = ["-S", "train.frozen.epochs=12", "-S", "train.finetuned.epochs=12"]
    dvc(project, "exp", "run", *easy)
    alone = json.loads((project / "metrics/evaluation.json").read_text())
    launcher = "train.launcher=torchrun --standalone --nproc-per-node=2"
    output = dvc(project, "exp", "run", *easy, "-S", launcher)
    assert len(re.findall(r"^> torchrun .* -m stages.train", output, re.MULTILINE)) == 2
    assert output.count("frozen epoch 12:") == 1  # only one of them logs
    together = json.loads((project / "metrics/evaluation.json").read_text())
    for mode in params.MODES:
        assert abs(together[f"{mode}.accuracy"] - alone[f"{mode}.accuracy"]) <= 0.01
        assert together[f"{mode}.accuracy"] > 0.9
