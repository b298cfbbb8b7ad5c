"""Two experiments, and two Git revisions, compared with the commands that the README names."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import commit, dvc, ran

from tools import demo
from tools.isolated import environment, git
from transfer.common.settings import MODES, load_params

PAIRS = [("base", "short"), ("HEAD", "later")]  # experiments; Git revisions
EPOCHS = {mode: demo.SETTINGS["train"][mode]["epochs"] for mode in MODES}
DIFFS = """
import sys
from dvc.cli import main
revisions = sys.argv[1:]
for command in ("exp", "metrics", "params"):
    assert main([command, "diff", *revisions, "--json"]) == 0
assert main(["plots", "diff", *revisions]) == 0
"""


@pytest.fixture(scope="module")
def compared(reproduced, tmp_path_factory) -> Path:
    """A project with the experiments `base` and `short`, and what `short` changed on `later`."""
    folder = tmp_path_factory.mktemp("compared") / "project"
    shutil.copytree(reproduced, folder, symlinks=True)
    assert ran(dvc(folder, "exp", "run", "--name", "base")) == []
    # Up to `evaluate`: pictures are not compared, and drawing them takes 10 s.
    short = ["--name", "short", "-S", "train.frozen.epochs=1", "evaluate"]
    assert ran(dvc(folder, "exp", "run", *short)) == ["train@frozen", "evaluate"]
    git(folder, "switch", "--quiet", "--create", "later")
    commit(folder, "one epoch")
    git(folder, "switch", "--quiet", "-")
    return folder


def make(folder: Path, target: str) -> str:
    """What `make TARGET` prints, with this Python's packages instead of a new .venv."""
    return subprocess.run(
        ["make", "--silent", "--old-file=.venv/installed", target],
        cwd=folder, env=environment(), check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip


def sweep(folder: Path, name: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.sweep", name]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def flatten(values: dict, above: str = "") -> dict:
    """Nested metrics with the names that DVC gives them."""
    flat = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        flat |= flatten(value, f"{above}{name}.") if inner else {above + name: value}
    return flat


def committed(folder: Path, revision: str) -> dict:
    """The metrics at a Git revision."""
    return flatten(json.loads(git(folder, "show", f"{revision}:metrics/evaluation.json")))


def charts(folder: Path) -> dict[str, list[dict]]:
    """The points of each chart in DVC's page of plots, by the chart's title."""
    page = (folder / "dvc_plots/index.html").read_text()
    assert "<DVC_METRIC" not in page  # a placeholder of a template that DVC did not fill
    specs = [json.loads(text) for text in re.findall(r"var spec = (.*);\n", page)]
    return {spec["title"]["text"]: spec["data"]["values"] for spec in specs}


def check_charts(found: dict[str, list[dict]], epochs: dict[str, dict[str, int]]) -> None:
    """Each chart holds all of its points, for each revision with so many epochs of each mode."""
    assert list(found) == [
        "Accuracy after each epoch",
        "Loss after each epoch",
        "Confusion matrix, frozen",
        "Confusion matrix, finetuned",
        "Accuracy per class",
        "Reliability diagram",
    ]
    accuracy, loss, frozen, finetuned, classes, calibration = found.values()
    for curves in (accuracy, loss):  # the template takes the mode from the file name
        counts = Counter((p["rev"], p["filename"].split("/")[0]) for p in curves)
        assert counts == {(rev, m): n for rev, modes in epochs.items() for m, n in modes.items()}
    for confusion in (frozen, finetuned):
        assert Counter(p["rev"] for p in confusion) == dict.fromkeys(epochs, 200)
    both = {(rev, mode) for rev in epochs for mode in MODES}
    assert Counter((p["rev"], p["field"]) for p in classes) == dict.fromkeys(both, 10)
    assert {(p["rev"], p["filename"].split(".")[0]) for p in calibration} == both


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_diffs_tell_what_changed_and_no_more(compared, old, new):
    before, after = committed(compared, "HEAD"), committed(compared, "later")
    changed = {key for key in before if before[key] != after[key]}
    assert "frozen.loss" in changed
    metrics = {
        key: {"old": before[key], "new": after[key], "diff": after[key] - before[key]}
        for key in changed
    }
    setting = {
        "train.frozen.epochs": {"old": EPOCHS["frozen"], "new": 1, "diff": 1 - EPOCHS["frozen"]}
    }

    output = subprocess.check_output(  # in one process: starting DVC takes most of the time
        [sys.executable, "-c", DIFFS, old, new], cwd=compared, env=environment(), text=True
    )
    exp_diff, metrics_diff, params_diff = map(json.loads, output.splitlines()[:3])
    assert metrics_diff == {"metrics/evaluation.json": metrics}
    assert params_diff == {"params.yaml": setting}
    assert exp_diff == {"metrics": metrics_diff, "params": params_diff}
    check_charts(charts(compared), {old: EPOCHS, new: EPOCHS | {"frozen": 1}})


def test_exp_show_has_accuracies_and_gain_first(compared):
    header, *rows = csv.reader(io.StringIO(dvc(compared, "exp", "show", "--csv")))
    first = [name for name in header if "." in name or name == "gain"][:3]
    assert first == ["frozen.accuracy", "finetuned.accuracy", "gain"]
    losses = {row[0] or row[1]: row[header.index("frozen.loss")] for row in rows}
    assert float(losses["base"]) == committed(compared, "HEAD")["frozen.loss"]
    assert float(losses["short"]) == committed(compared, "later")["frozen.loss"]


def test_a_table_and_a_figure_of_experiments(compared, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "project", symlinks=True)
    assert ran(dvc(folder, "exp", "run", "--name", "images-1")) == []
    dvc(folder, "exp", "run", "--name", "images-2", "-S", "train.frozen.epochs=1", "evaluate")
    # One that fails: DVC shows it with the results of the commit.
    dvc(folder, "exp", "run", "--queue", "--name", "images-3", "-S", "train.shared.images=1")
    dvc(folder, "exp", "run", "--run-all")
    printed = sweep(folder, "images")
    assert printed.returncode == 0, printed.stderr
    both = [committed(compared, revision) for revision in ("HEAD", "later")]
    assert "Failed" in dvc(folder, "exp", "show", "--csv")
    with (folder / "docs/images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    share = load_params(str(folder / "params.yaml")).train.shared.validation_share
    count = round(50_000 * (1 - share))  # of CIFAR-10
    assert {(row["train.shared.images"], row["model.weights"]) for row in rows} == {
        (str(count), "random")
    }
    for mode in MODES:
        found = {float(row[f"{mode}.accuracy"]) for row in rows}
        assert found == {values[f"{mode}.accuracy"] for values in both}
    accuracy = both[0]["finetuned.accuracy"]  # the demo has random weights
    assert f"{accuracy:.2%}" in printed.stdout
    assert re.search(rf"from scratch +{count:,} +2 ", printed.stdout)
    assert (folder / "docs/images.png").read_bytes().startswith(b"\x89PNG")


def test_the_minutes_of_experiments(compared, tmp_path):
    folder = shutil.copytree(compared, tmp_path / "project", symlinks=True)
    dvc(folder, "exp", "run", "--name", "recipes-1")
    cost = json.loads((folder / "metrics/cost.json").read_text())
    del cost["machine"]
    seconds = sum(stage["seconds"] for stage in cost.values())
    printed = sweep(folder, "recipes")
    assert printed.returncode == 0, printed.stderr
    with (folder / "docs/recipes.csv").open() as file:
        [row] = csv.DictReader(file)
    assert re.search(rf"from scratch +{float(row['minutes']):g} +1 ", printed.stdout)
    assert float(row["minutes"]) == pytest.approx(seconds / 60, abs=0.05001)
    assert int(row["train.finetuned.epochs"]) == EPOCHS["finetuned"]


def test_a_sweep_that_does_not_exist(compared):
    found = sweep(compared, "colours")
    assert found.returncode == 1
    assert found.stderr == (
        "error: no sweep is named 'colours'; give one of seeds, heads, images, blocks, recipes\n"
    )


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")


@needs_make
def test_make_compare_prints_modes_gain_and_changed_params(compared):
    commit, *lines = make(compared, "compare").strip().splitlines()
    assert commit.startswith(f"Commit {git(compared, 'rev-parse', '--short', 'HEAD').strip()} of ")
    assert max(map(len, lines)) <= 100
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    results = ["frozen.accuracy", "finetuned.accuracy", "gain"]
    assert header == ["Experiment", *results, "train.frozen.epochs"]
    for name, revision, epochs in (("base", "HEAD", EPOCHS["frozen"]), ("short", "later", 1)):
        [row] = [row for row in rows if f"[{name}]" in row[0]]
        values = committed(compared, revision)
        assert row[1:4] == [f"{values[key]:.4g}" for key in results]
        assert row[4] == str(epochs)


@needs_make
def test_make_compare_and_make_plots_without_experiments(reproduced):
    _, header, _, *rows = make(reproduced, "compare").strip().splitlines()
    assert re.findall(r"[\w.]+", header) == [
        "Experiment", "frozen.accuracy", "finetuned.accuracy", "gain"
    ]  # fmt: skip
    assert len(rows) == 2  # the workspace and the last commit
    make(reproduced, "plots")
    check_charts(charts(reproduced), {"workspace": EPOCHS})
