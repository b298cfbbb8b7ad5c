"""Experiments and Git revisions compared with the commands that the README names, and sweeps."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from dvc.utils.flatten import flatten
from helpers import dvc, edit, python, ran, refusal

from tools import demo, sweep
from tools.isolated import environment, git
from transfer.common.settings import MODES

ACCURACIES = [f"{mode}.accuracy" for mode in MODES]
EPOCHS = {mode: demo.SETTINGS["train"][mode]["epochs"] for mode in MODES}
SETTING, MANY, FEW = "train.finetuned.epochs", EPOCHS["finetuned"], 1
PAIRS = [("epochs-0-1", "epochs-0-2"), ("HEAD", "later")]  # experiments; Git revisions
DIFFS = """
import sys
from dvc.cli import main
for command in ("exp", "metrics", "params"):
    assert main([command, "diff", *sys.argv[1:], "--json"]) == 0
assert main(["plots", "diff", *sys.argv[1:]]) == 0
"""
COLUMNS, GRIDS = [SETTING, "train.shared.images", "minutes"], [{SETTING: f"{FEW},{MANY}"}]
FIGURE = {"title": "Epochs", "x": {SETTING: "epochs", "minutes": "minutes"}}
SWEEP = {"columns": COLUMNS, "grids": GRIDS, "figure": FIGURE}


@pytest.fixture(scope="module")
def compared(reproduced, tmp_path_factory) -> Path:
    """A project with two experiments; the branch `later` has the results of the second."""
    folder = tmp_path_factory.mktemp("compared") / "project"
    shutil.copytree(reproduced, folder, symlinks=True)
    assert ran(dvc(folder, "exp", "run", "--temp", "--name", "epochs-0-1")) == []
    # Up to `evaluate`: pictures are not compared, and drawing them takes time.
    shorter = ["--temp", "--name", "epochs-0-2", "-S", f"{SETTING}={FEW}", "evaluate"]
    assert ran(dvc(folder, "exp", "run", *shorter)) == ["train@finetuned", "evaluate"]
    dvc(folder, "exp", "branch", "epochs-0-2", "later")
    assert git(folder, "status", "--porcelain") == ""  # with --temp, the project stays as it is
    return folder


def committed(folder: Path, revision: str, name: str = "evaluation") -> dict:
    """A file of metrics at a Git revision, with DVC's names."""
    return flatten(json.loads(git(folder, "show", f"{revision}:metrics/{name}.json")))


def make(folder: Path, target: str) -> list[str]:
    """What `make TARGET` prints, with this Python's packages instead of a new .venv."""
    command = ["make", "--silent", "--old-file=.venv/installed", target]
    return subprocess.check_output(command, cwd=folder, env=environment(), text=True).splitlines()


def check_charts(folder: Path, epochs: dict[str, dict[str, int]]) -> None:
    """DVC's page of plots has all points of each revision, with so many epochs of each mode."""
    page, charts = (folder / "dvc_plots/index.html").read_text("utf-8"), {}
    assert "<DVC_METRIC" not in page  # a placeholder of a template that DVC did not fill
    for spec in map(json.loads, re.findall(r"var spec = (.*);\n", page)):
        # A template takes the mode from the name of the file, or from the field.
        by_file = "split(datum.filename, '.')[0]" in json.dumps(spec)
        charts[spec["title"]["text"]] = Counter(
            (p["rev"], *({Path(p["filename"]).stem if by_file else p.get("field")} & {*MODES}))
            for p in spec["data"]["values"]
        )
    curves = {(rev, mode): n for rev, modes in epochs.items() for mode, n in modes.items()}
    assert charts.pop("Reliability diagram").keys() == curves.keys()
    expected = {f"{what} after each epoch": curves for what in ("Accuracy", "Loss")}
    expected |= {f"Confusion matrix, {mode}": {(rev,): 200 for rev in epochs} for mode in MODES}
    assert charts == expected | {"Accuracy per class": dict.fromkeys(curves, 10)}


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_diffs_tell_what_changed_and_no_more(compared, old, new):
    before, after = (committed(compared, revision) for revision in PAIRS[1])
    differing = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    assert {"finetuned.accuracy", "gain"} <= differing.keys()
    metrics = {key: {"old": a, "new": b, "diff": b - a} for key, (a, b) in differing.items()}
    params = {SETTING: {"old": MANY, "new": FEW, "diff": FEW - MANY}}
    done = python(compared, "-c", DIFFS, old, new)  # one process: starting DVC takes most time
    both, *each = map(json.loads, done.stdout.splitlines()[:3])
    assert each == [{"metrics/evaluation.json": metrics}, {"params.yaml": params}]
    assert both == {"metrics": each[0], "params": each[1]}
    check_charts(compared, {old: EPOCHS, new: EPOCHS | {"finetuned": FEW}})


def test_exp_show_has_accuracies_and_gain_first(compared):
    header = dvc(compared, "exp", "show", "--csv").splitlines()[0].split(",")
    assert [key for key in header if "." in key or key == "gain"][:3] == [*ACCURACIES, "gain"]


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_compare_and_make_plots(compared, reproduced):
    first, header, _, *lines = make(compared, "compare")
    assert first.startswith(git(compared, "log", "-1", "--format=Commit %h of %as").strip())
    assert max(map(len, lines)) <= 80
    assert header.split() == ["frozen", "%", "finetuned", "%", "gain"]
    values = {
        name: [f"{100 * committed(compared, revision)[key]:.2f}" for key in (*ACCURACIES, "gain")]
        for name, revision in zip(*PAIRS, strict=True)
    }
    same, other = values
    rows = [*map(str.split, lines)]
    assert [same, *values[same]] in rows
    assert rows[rows.index([other, *values[other]]) + 1] == [f"{SETTING}={FEW}"]
    assert len(rows) == 4  # the commit, and each experiment
    assert [line.split()[1] for line in make(reproduced, "compare")[3:]] == ["commit"]
    make(compared, "plots")
    check_charts(compared, {"workspace": EPOCHS})


def table(folder: Path, monkeypatch, *options: str, **changes) -> None:
    """Run tools.sweep in this process, in the project with the experiments."""
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sweep.SWEEPS, "epochs", SWEEP | changes)
    monkeypatch.setattr(sys, "argv", ["sweep", "epochs", *options])
    sweep.main()


def test_a_table_and_a_figure_of_experiments(compared, monkeypatch, capsys):
    table(compared, monkeypatch, "--table")
    rows = list(csv.DictReader(Path("docs/epochs.csv").read_text("utf-8").splitlines()))
    for row, epochs, revision in zip(rows, (FEW, MANY), reversed(PAIRS[1]), strict=True):
        costs, results = (committed(compared, revision, name) for name in ("cost", "evaluation"))
        minutes = sum(n for key, n in costs.items() if key.endswith("seconds")) / 60
        settings = (f"{epochs}", "350", f"{minutes:.1f}", "0", "random")
        assert (*row.values(),) == (*settings, *(f"{results[key]}" for key in ACCURACIES))
    printed = f"from scratch +{MANY} +1 +{committed(compared, 'HEAD')['finetuned.accuracy']:.2%}"
    assert re.search(printed, capsys.readouterr().out)
    assert Path("docs/epochs.png").read_bytes().startswith(b"\x89PNG")


REFUSED = {
    f"epochs-0-2: has {SETTING} = 1, .* remove epochs-0-2": {"grids": [{"seed": 0}]},
    "data.classes = null has no place in a table": {"columns": ["data.classes"]},
}


@pytest.mark.parametrize("words", REFUSED)
def test_misleading_tables_are_refused(compared, monkeypatch, words):
    refused = refusal(lambda: table(compared, monkeypatch, "--table", **REFUSED[words]))
    assert re.search(words, refused)


def test_a_sweep_of_changed_settings_is_refused_before_anything_is_queued(compared, monkeypatch):
    edit(compared / "params.yaml", "seed: 0", "seed: 1")
    assert "all experiments would differ from the last commit: " in refusal(
        lambda: table(compared, monkeypatch)
    )
    git(compared, "restore", "params.yaml")
    assert "Queued" not in dvc(compared, "queue", "status")


@pytest.mark.faults
def test_a_sweep_runs_its_experiments_and_refuses_a_table_that_would_lack_one(project):
    grids = [{SETTING: FEW}, {"train.shared.images": 1}]
    (project / "tools/sweeps.yaml").write_text(yaml.safe_dump({"epochs": SWEEP | {"grids": grids}}))
    error = python(project, "-m", "tools.sweep", "epochs").stderr.splitlines()[-1]
    assert error.startswith("error: epochs-1: Failed, so the table would lack it")
    dvc(project, "queue", "remove", "--failed")
    assert python(project, "-m", "tools.sweep", "epochs", "--table").returncode == 0
    assert (project / "docs/epochs.csv").read_text().splitlines()[1].startswith(f"{FEW},350,")
