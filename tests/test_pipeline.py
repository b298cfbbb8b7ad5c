import csv
import json
import os
import re

import pytest
from helpers import STAGES, dvc, edit, per_class, ran, stage
from PIL import Image

from transfer.common.settings import MODES


@pytest.fixture
def one_core():
    """Leave this process, and those that it starts, one core, where that can be set."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def test_repro_runs_every_stage_and_logs_plain_lines(reproduced):
    log = reproduced.with_suffix(".log").read_text()
    assert sorted(ran(log)) == sorted(STAGES)
    assert "\r" not in log
    assert "frozen epoch 1: train_loss" in log
    assert re.search(
        r"frozen \d+\.\d\d %, finetuned \d+\.\d\d %: fine-tuning adds -?\d+\.\d\d points .*\n"
        r"Of the first 16 test images, frozen has \d+ right, .*: figures.first_batch.png\n",
        log,
    )
    costs = json.loads((reproduced / "metrics/cost.json").read_text())
    assert set(costs) == set(STAGES)
    assert 100 < costs["train@frozen"]["peak_mib"] < 4000
    assert "up to date" in dvc(reproduced, "repro")


def test_the_metrics_answer_the_question_first(reproduced):
    values = json.loads((reproduced / "metrics/evaluation.json").read_text())
    assert list(values)[:3] == ["frozen.accuracy", "finetuned.accuracy", "gain"]
    assert values["gain"] == pytest.approx(values["finetuned.accuracy"] - values["frozen.accuracy"])
    assert values["gain_low"] <= values["gain"] <= values["gain_high"]
    for line in dvc(reproduced, "metrics", "show").splitlines():
        assert len(line) <= 100
    values |= json.loads((reproduced / "metrics/details.json").read_text())
    assert values["finetuned.parameters"] == values["finetuned.trainable"] == 24_224 + 344_330
    assert values["frozen.trainable"] == 344_330
    with (reproduced / "metrics/predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 200
    for mode in MODES:
        correct = sum(row[mode] == row["label"] for row in rows) / len(rows)
        assert values[f"{mode}.accuracy"] == pytest.approx(correct)
        assert 0 <= values[f"{mode}.ece"] <= 1
        assert values[f"{mode}.loss"] > 0
        recalls = per_class(reproduced)[mode]
        assert len(recalls) == 10
        assert sum(recalls.values()) / 10 == pytest.approx(correct)


def test_figures_are_there_and_hold_nothing_but_the_figure(reproduced):
    names = {
        "first_batch",
        "first_rows",
        "changed",
        "learning_curves",
        "confusion",
        "per_class",
        "movement",
    }
    assert {path.stem for path in (reproduced / "figures").iterdir()} == names
    for name in names:
        with Image.open(reproduced / f"figures/{name}.png") as image:
            assert min(image.size) > 300
            assert set(image.info) <= {"dpi"}


def test_same_bytes_in_another_folder_on_one_core_whatever_omp_says(project, one_core):
    kept = {"cost.json"}
    paths = [p for f in ("models", "metrics", "figures") for p in (project / f).rglob("*.*")]
    before = {p: p.read_bytes() for p in paths if p.is_file() and p.name not in kept}
    assert len(before) > 15
    # What another launcher sets for every process does not count.
    around = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    assert sorted(ran(dvc(project, "repro", "--force", **around))) == sorted(STAGES)
    assert [p for p in before if before[p] != p.read_bytes()] == []
    assert set(json.loads((project / "metrics/cost.json").read_text())) == set(STAGES)


def test_the_worked_example_is_one_line(project):
    """ResNet18 with everything frozen and a new last layer for two classes, as in the README."""
    settings = "model.name=resnet18 model.blocks=null model.head=linear data.classes=[cat,dog]"
    small = "train.frozen.epochs=1 train.finetuned.epochs=1"
    changes = [f"-S{setting}" for setting in f"{settings} {small}".split()]
    assert sorted(ran(dvc(project, "exp", "run", *changes))) == sorted(STAGES)
    values = json.loads((project / "metrics/details.json").read_text())
    assert values["frozen.trainable"] == 512 * 2 + 2
    assert values["frozen.parameters"] == values["finetuned.trainable"] == 11_177_538
    assert list(per_class(project)["frozen"]) == ["cat", "dog"]


def test_a_bad_setting_stops_repro_before_any_work(project):
    edit(project / "params.yaml", "views: 2", "views: 0")
    before = (project / "models/frozen.safetensors").read_bytes()
    output = dvc(project, "repro", "train@frozen", fails=True)
    assert "error: params.yaml: train.frozen.views = 0: must be" in output
    assert "Traceback" not in output
    done = stage(project, "train frozen")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert dvc(project, "checkout", "--quiet") == ""
    assert (project / "models/frozen.safetensors").read_bytes() == before
