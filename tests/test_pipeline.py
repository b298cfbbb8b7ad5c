import csv
import json
import os

import pytest
from conftest import dvc, ran, stage
from PIL import Image

from transfer import params

STAGES = ["download", "backbone", "train@frozen", "train@finetuned", "evaluate", "render"]


def stale(project) -> set[str]:
    """The stages that DVC would run because something of their own has changed."""
    return set(json.loads(dvc(project, "status", "--json")))


def edit(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


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
    costs = json.loads((reproduced / "metrics/cost.json").read_text())
    assert set(costs) == {*STAGES, "machine"}
    assert "up to date" in dvc(reproduced, "repro")


def test_the_metrics_answer_the_question_first(reproduced):
    values = json.loads((reproduced / "metrics/evaluation.json").read_text())
    assert list(values)[:3] == ["frozen.accuracy", "finetuned.accuracy", "gain"]
    assert values["gain"] == pytest.approx(values["finetuned.accuracy"] - values["frozen.accuracy"])
    assert values["gain_ci_low"] <= values["gain"] <= values["gain_ci_high"]
    assert values["finetuned.parameters"] == values["finetuned.trainable"] == 24_224 + 344_330
    assert values["frozen.trainable"] == 344_330
    with (reproduced / "metrics/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 200
    for mode in params.MODES:
        right = sum(row[mode] == row["actual"] for row in rows) / len(rows)
        assert values[f"{mode}.accuracy"] == pytest.approx(right)
        assert 0 <= values[f"{mode}.ece"] <= 1
        assert values[f"{mode}.loss"] > 0
        classes = [values[f"{mode}.{name}"] for name in ("cat", "dog", "truck")]
        assert all(0 <= accuracy <= 1 for accuracy in classes)


def test_pictures_are_there_and_hold_nothing_but_the_picture(reproduced):
    names = ("first_batch", "learning_curves", "confusion", "per_class")
    for name in names:
        with Image.open(reproduced / f"figures/{name}.png") as image:
            assert min(image.size) > 300
            assert set(image.info) <= {"dpi"}


def test_same_bytes_in_another_folder_on_one_core_whatever_omp_says(project, one_core):
    kept = {"cost.json"}
    paths = [p for f in ("models", "metrics", "figures") for p in (project / f).rglob("*.*")]
    before = {p: p.read_bytes() for p in paths if p.is_file() and p.name not in kept}
    assert len(before) > 15
    assert sorted(ran(dvc(project, "repro", "--force", OMP_NUM_THREADS="1"))) == sorted(STAGES)
    assert [p for p in before if before[p] != p.read_bytes()] == []


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("transfer/figures.py", "#0072B2", "#000000", {"render"}),
        ("transfer/evaluation.py", "BINS = 15", "BINS = 10", {"evaluate"}),
        ("params.yaml", "views: 2", "views: 3", {"train@frozen"}),
        ("params.yaml", "crop: 4", "crop: 3", {"train@frozen", "train@finetuned"}),
        ("params.yaml", "batch_size: 16", "batch_size: 8", {"render"}),
        ("transfer/model.py", "width = 128", "width = 64",
         {"backbone", "train@frozen", "train@finetuned", "evaluate"}),
    ],
)  # fmt: skip
def test_a_change_makes_stale_what_it_reaches_and_no_more(project, file, old, new, changed):
    edit(project / file, old, new)
    assert stale(project) == changed


def test_the_worked_example_is_one_line(project):
    """ResNet18 with everything frozen and a new last layer for two classes, as in the README."""
    settings = "model.name=resnet18 model.blocks=null model.head=linear data.classes=[cat,dog]"
    small = "data.validation=20 train.frozen.epochs=1 train.finetuned.epochs=1"
    changes = [f"-S{setting}" for setting in f"{settings} {small}".split()]
    assert sorted(ran(dvc(project, "exp", "run", *changes))) == sorted(STAGES)
    values = json.loads((project / "metrics/evaluation.json").read_text())
    assert values["frozen.trainable"] == 512 * 2 + 2
    assert values["frozen.parameters"] == values["finetuned.trainable"] == 11_177_538
    assert {"frozen.cat", "frozen.dog"} < set(values)
    assert "frozen.ship" not in values


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


def test_the_demo_says_what_it_is(reproduced):
    log = reproduced.with_suffix(".log").read_text()
    assert log.count("its numbers mean nothing") == 2
    assert "| frozen.accuracy" in log
