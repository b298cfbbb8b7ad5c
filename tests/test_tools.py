"""The programs in tools/, without what needs the internet; test_verify.py has verify."""

import importlib
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, commit, dvc, python, refusal
from PIL import Image

from tools import predict, setup
from transfer.run import model_path, read_csv
from transfer.settings import MODES


@pytest.mark.parametrize("name", ["demo", "export", "predict", "setup", "sweep", "verify"])
def test_every_program_says_how_it_is_used(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"tools.{name}").main()
    assert capsys.readouterr().out.startswith(f"usage: python -m tools.{name} [-h]")


def test_an_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    with pytest.raises(SystemExit, match=r"^error: Python 3\.11\.4 or newer is needed"):
        setup.set_up(cpu=False)


def test_without_cuda_the_lock_file_lacks_cuda_and_no_more():
    lock = setup.LOCK.read_text(encoding="utf-8")
    entry = re.compile(r"^([\w.-]+)(==.*(?:\n .*)*)", re.M)
    whole, rest = (dict(entry.findall(text)) for text in (lock, setup.without_cuda(lock)))
    assert rest.items() <= whole.items()
    left = {name for name in whole.keys() - rest.keys() if not re.match("nvidia-|cuda-", name)}
    assert left == {"torch", "torchvision", "triton"}
    assert not [name for name in rest if re.search("nvidia|cuda", name)]


def test_predictions_of_a_folder_are_those_of_the_evaluation(project, monkeypatch, capsys):
    """A damaged file is named, and the others are predicted; a file that is named twice, once."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["predict", "stripes/test", "stripes/test/angle 0/00000.png"])
    damaged = Path("stripes/test/angle 3/00003.png")
    os.truncate(damaged, 600)
    with pytest.raises(SystemExit) as ended:
        predict.main()
    assert ended.value.code == 1
    printed, errors = capsys.readouterr()
    assert errors.startswith(f"error: {damaged}: cannot be read as an image: ")
    assert errors.count("\n") == 1
    rows = read_csv(Path("predictions.csv"))
    known = {f"stripes/{r['image']}": r for r in read_csv(Path("metrics/predictions.csv"))}
    assert {row["path"] for row in rows} == known.keys() - {damaged.as_posix()}
    for mode in MODES:
        assert [row[mode] for row in rows] == [known[row["path"]][mode] for row in rows]
        shares, wanted = (
            [float(row[f"{mode}_confidence"]) for row in table]
            for table in (rows, [known[row["path"]] for row in rows])
        )
        assert shares == pytest.approx(wanted, abs=0.0002)
    assert printed.startswith(f"{rows[0]['path']}: frozen {rows[0]['frozen']} ")
    assert Image.open("predictions.png").width > 800

    model_path("finetuned").unlink()
    assert refusal(predict.main) == f"{model_path('finetuned')}: is missing; run dvc repro"


@pytest.mark.faults
def test_a_sweep_runs_its_experiments_and_refuses_a_table_with_one_that_failed(project):
    rate, epochs = "train.finetuned.backbone_lr", "train.finetuned.epochs"
    grids = [{rate: "1e-3,1e-2", epochs: 1}, {"train.shared.images": 9}]
    sweeps = yaml.safe_dump({"rates": {"about": "rates", "x": rate, "grids": grids}})
    (project / "tools/sweeps.yaml").write_text(sweeps, encoding="utf-8")
    commit(project, "a sweep")
    for options in ([], ["--table"]):
        done = python(project, "-m", "tools.sweep", "rates", *options)
        assert done.stderr.endswith("error: rates-1: Failed; run or remove it first\n")
    dvc(project, "queue", "remove", "--failed")
    assert python(project, "-m", "tools.sweep", "rates", "--table").returncode == 0
    rows = read_csv(project / "docs/rates.csv")
    values = (f"{mode}.{part}" for part in ("validation", "accuracy") for mode in MODES)
    assert [*rows[0]] == [epochs, rate, "minutes", "moved", *values]
    assert [float(row[rate]) for row in rows] == [1e-3, 1e-2]
    assert rows[0]["frozen.accuracy"] == rows[1]["frozen.accuracy"]  # the same frozen model
    assert all(float(row["minutes"]) > 0 for row in rows)
    assert Image.open(project / "docs/rates.png").width > 800


@pytest.mark.faults
def test_the_demo_shows_that_transfer_beats_training_from_scratch_and_keeps_figures(project):
    shutil.copy(ROOT / "params.yaml", project)
    commit(project, "settings")
    done = python(project, "-m", "tools.demo")
    assert done.returncode == 0, done.stderr
    accuracies = re.findall(r"(\d+\.\d)%", done.stdout.splitlines()[-1])
    scratch, frozen, finetuned = map(float, accuracies)
    assert scratch + 10 < min(frozen, finetuned)
    for result in ("figures/first_batch.png", "metrics/evaluation.json"):
        assert (project / "demo" / result).is_file()
