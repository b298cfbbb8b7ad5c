"""The programs in tools/, without what needs the internet; test_verify.py has verify."""

import os
import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, commit, dvc, python, refusal, start
from PIL import Image

from tools import predict, setup
from tools.sweep import VALIDATION
from transfer.run import model_path, read_csv
from transfer.settings import MODES

PROGRAMS = [
    "stages.download", "stages.evaluate", "stages.network", "stages.render", "stages.train",
    "transfer.settings", "tools.demo", "tools.export", "tools.notebook", "tools.predict",
    "tools.setup", "tools.sweep", "tools.verify",
]  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_says_how_it_is_used_and_refuses_unknown_options(monkeypatch, capsys, name):
    for option, status in (("--help", "0"), ("--unknown", "2")):
        monkeypatch.setattr(sys, "argv", [name, option])
        with pytest.raises(SystemExit, match=status), warnings.catch_warnings(action="ignore"):
            runpy.run_module(name, run_name="__main__")
        assert re.search(rf"usage: python -m {name} \[-h\]", "".join(capsys.readouterr()))


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    code = "from transfer.run import run_tool; run_tool(lambda: print('line\\n' * 100_000))"
    with start(tmp_path, "-c", code, variables={"PYTHONPATH": str(ROOT)}) as child:
        assert child.stdout.readline() == "line\n"
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 0


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
    sweeps = yaml.safe_dump(
        {"rates": {"about": "rates", "message": "all", "x": rate, "grids": grids}}
    )
    (project / "tools/sweeps.yaml").write_text(sweeps, encoding="utf-8")
    commit(project, "a sweep")
    for options in ([], ["--table"]):
        done = python(project, "-m", "tools.sweep", "rates", *options)
        assert done.stderr.endswith("error: rates-1: Failed; run or remove it first\n")
    dvc(project, "queue", "remove", "--failed")
    assert python(project, "-m", "tools.sweep", "rates", "--table").returncode == 0
    rows = read_csv(project / "docs/rates.csv")
    names = ("minutes", *VALIDATION, "accuracy")
    values = [f"{mode}.{name}" for mode in MODES for name in names]
    assert [*rows[0]] == [epochs, rate, "moved", *values]
    assert [float(row[rate]) for row in rows] == [1e-3, 1e-2]
    assert rows[0]["frozen.accuracy"] == rows[1]["frozen.accuracy"]  # the same frozen model
    assert rows[0][epochs] == "1"
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
