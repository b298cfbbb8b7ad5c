"""What the machine gives: a folder of assets, memory, a shallow clone; and how a stage ends."""

import sys

import pytest
from helpers import dvc, python, refusal, set_params

from tools.isolated import git
from transfer.fetch import assets_dir

LIMITED = """
import psutil, resource
from stages import download, train
from transfer.common.run import run_stage
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + {} * 2**20, -1))
run_stage("limited", lambda: {})
"""


@pytest.mark.parametrize("folder", ["project", "project/.dvc/tmp/exps/tmpabc"])
@pytest.mark.parametrize("value", ["", "~/project", "../project", "../nowhere", "~nobody/x"])
def test_assets_are_where_the_variable_says_or_it_is_refused(monkeypatch, tmp_path, folder, value):
    (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / folder)
    for name, text in (("HOME", tmp_path), ("USERPROFILE", tmp_path), ("ASSETS_DIR", value)):
        monkeypatch.setenv(name, str(text))
    if "project" in value:
        assert assets_dir().samefile(tmp_path / "project")
    else:
        assert (f"ASSETS_DIR = {value}: " in refusal(assets_dir)) if value else assets_dir() is None


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of Linux")
@pytest.mark.parametrize("limited", [(100, "download.main()"), (700, "train.main('finetuned')")])
def test_too_little_memory_ends_in_one_line(project, limited):
    set_params(project, {"model": {"image_size": 512}, "train": {"shared": {"batch_size": 300}}})
    [line] = python(project, "-c", LIMITED.format(*limited)).stderr.splitlines()
    assert line.startswith("error: not enough memory: lower train.shared.batch_size or model.")


def test_an_experiment_that_a_shallow_clone_would_lose_is_refused(project, tmp_path):
    git(tmp_path, "clone", "--quiet", "--depth", "1", project.as_uri(), "shallow")
    command = ["exp", "run", "--temp", "-S", "seed=1", "download"]
    assert "is a shallow clone" in dvc(tmp_path / "shallow", *command, fails=True)
