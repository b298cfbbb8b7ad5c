"""The whole pipeline, run by DVC as a user runs it."""

import json
import re
from pathlib import Path

import pytest
from dvc.repo import Repo
from helpers import STAGES, dvc, git, python, ran, set_params
from PIL import Image

from transfer.run import read_csv
from transfer.settings import MODES

EXAMPLE = "model.name=resnet18 model.blocks=null model.head=linear data.classes=[cat,dog]"
ON_ONE_CORE = """import os, sys
from dvc.cli import main
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.exit(main(["repro", "--force"]))"""
SURROUNDINGS = {"OMP_NUM_THREADS": "1", "OMP_DYNAMIC": "true", "OMP_THREAD_LIMIT": "1", "RANK": "1"}
FAILURES = [  # changed settings, the stages that are run, and what is said
    ({"seed": 1, "figures.first_batch_size": 0}, ["settings"],
     "^error: params.yaml: figures.first_batch_size = 0: must be greater than or equal to 1$"),
    ({"train.shared.images": 9}, ["settings", "train@frozen"],
     "^error: train.shared.images = 9: must be at least 10, .* and at most 350, .*$"),
    ({"train.launcher": "python -c pass"}, ["settings", "train@frozen"],
     "'train@frozen': output 'models.frozen.safetensors' does not exist$"),
]  # fmt: skip


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"metrics/{name}.json").read_text(encoding="utf-8"))


def results(folder: Path) -> dict[Path, bytes]:
    """The content of each result, except for what the run cost."""
    paths = [p for part in ("models", "metrics", "figures") for p in (folder / part).rglob("*")]
    return {p: p.read_bytes() for p in paths if p.is_file() and p.name != "cost.json"}


def test_repro_runs_every_stage_logs_plain_lines_and_records_what_each_stage_costs(reproduced):
    log = reproduced.with_suffix(".log").read_text(encoding="utf-8")
    assert ran(log) == ["settings", *STAGES]
    assert re.findall(r"\r|%\||Traceback|Warning|error", log) == []
    for mode in MODES:
        assert len(re.findall(rf"^{mode} epoch \d: train_loss .* validation_acc", log, re.M)) == 6
    number = r"-?\d+\.\d\d"
    answer = f"frozen {number} %, finetuned {number} %: fine-tuning adds {number} percentage points"
    assert re.search(f"^Accuracy on the test set: {answer} ", log, re.M)
    costs = read(reproduced, "cost")
    assert sorted(costs) == sorted(STAGES)
    assert sum(cost["seconds"] for cost in costs.values()) > 1
    assert all({"cpu", "cores", "python", "torch"} <= set(c["machine"]) for c in costs.values())


def test_the_metrics_fit_together(reproduced):
    values, details = (read(reproduced, name) for name in ("evaluation", "details"))
    assert list(values)[:3] == ["frozen.accuracy", "finetuned.accuracy", "gain"]
    assert values["gain"] == pytest.approx(values["finetuned.accuracy"] - values["frozen.accuracy"])
    assert values["gain_low"] <= values["gain"] <= values["gain_high"]
    rows = read_csv(reproduced / "metrics/predictions.csv")
    classes = read_csv(reproduced / "metrics/per_class.csv")
    assert (len(rows), len(classes)) == (200, 10)
    for mode in MODES:
        hits = [row["label"] for row in rows if row[mode] == row["label"]]
        assert values[f"{mode}.accuracy"] == len(hits) / 200
        recalls = {row["class"]: float(row[f"{mode}_recall"]) for row in classes}
        assert recalls == pytest.approx({name: hits.count(name) / 20 for name in recalls})
        assert details[f"{mode}.parameters"] == 24_224 + 344_330
    assert details["frozen.trainable"] == 344_330
    assert details["finetuned.trainable"] == details["finetuned.parameters"]


def test_figures_are_large_enough_and_hold_nothing_but_the_figure(reproduced):
    paths = list((reproduced / "figures").iterdir())
    assert len(paths) == 8
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert set(image.info) <= {"dpi"}


@pytest.mark.faults
def test_same_bytes_in_another_folder_on_one_core_whatever_the_environment_says(project):
    before = results(project)
    with Repo(str(project)) as repo:
        assert repo.status() == {}
    done = python(project, "-c", ON_ONE_CORE, **SURROUNDINGS)
    assert ran(done.stdout) == ["settings", *STAGES], done.stderr
    assert [path for path, content in results(project).items() if before[path] != content] == []
    assert sorted(read(project, "cost")) == sorted(STAGES)


def test_the_worked_example_is_one_command(project):
    """A ResNet18 with everything frozen and a new last layer for two classes."""
    for split in (project / "stripes/train", project / "stripes/test"):
        (split / "angle 3").rename(split / "cat")
        (split / "angle 8").rename(split / "dog")
    settings = [*EXAMPLE.split(), *(f"train.{mode}.epochs=1" for mode in MODES)]
    output = dvc(project, "exp", "run", *(f"-S{setting}" for setting in settings), "evaluate")
    assert ran(output) == STAGES[:-1]
    details = read(project, "details")
    assert details["frozen.trainable"] == 512 * 2 + 2
    assert details["frozen.parameters"] == details["finetuned.trainable"] == 11_177_538
    shown = dvc(project, "metrics", "show").splitlines()
    assert "frozen.accuracy" in shown[0]
    assert max(map(len, shown)) <= 100


@pytest.mark.parametrize(("changes", "reached", "message"), FAILURES)
def test_what_fails_says_why_and_the_earlier_results_come_back(project, changes, reached, message):
    before = results(project)
    set_params(project, changes)
    output = dvc(project, "repro", fails=True)
    assert ran(output) == reached
    assert len(re.findall(message, output, re.M)) == 1
    assert "Traceback" not in output
    git(project, "restore", ".")
    with Repo(str(project)) as repo:
        repo.checkout()
        assert repo.status() == {}
    assert results(project) == before
