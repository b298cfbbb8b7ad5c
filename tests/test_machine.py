"""Memory limits of every kind, where assets are looked for, and how a stage ends."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT, commit, dvc, edit, refusal, set_params, stage

from tools.isolated import environment, git
from transfer.common import machine
from transfer.fetch import assets_dir


def control_groups(root, lines: str, files: dict[str, dict[str, str]]) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for folder, values in files.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(f"{value}\n")


def version_2(limit: str, used: str, cache: str = "0") -> dict[str, str]:
    stat = f"anon 5\ninactive_file {cache}"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


@pytest.mark.parametrize(
    ("lines", "files", "left"),
    [
        ("0::/\n", {"": version_2("1000", "300")}, [700]),
        ("0::/\n", {"": version_2("1000", "900", cache="500")}, [600]),
        ("0::/\n", {"": version_2("max", "300")}, []),
        ("0::/a/b\n", {"a/b": version_2("max", "1"), "a": version_2("500", "100")}, [400]),
        ("0::/gone\n", {}, []),
        (
            "12:memory:/a\n3:cpu:/b\n0::/\n",
            {
                "memory/a": {
                    "memory.limit_in_bytes": "800", "memory.usage_in_bytes": "100",
                    "memory.stat": "total_inactive_file 50",
                }
            },
            [750],
        ),
    ],
)  # fmt: skip
def test_the_limits_of_containers_count(tmp_path, lines, files, left):
    control_groups(tmp_path, lines, files)
    assert machine._left_in_control_groups(tmp_path) == left


def test_free_memory_is_the_least_of_all_limits(monkeypatch):
    free = machine.free_memory()
    assert 2**20 < free < 2**50
    monkeypatch.setattr(machine, "_left_in_control_groups", lambda _: [2**40, 12345])
    assert machine.free_memory() == 12345


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of Linux")
def test_under_a_limit_of_the_process_too_large_a_step_is_refused_early(project):
    set_params(project, {"model": {"image_size": 512}, "train": {"shared": {"batch_size": 300}}})

    command = """
import psutil, resource
from stages.train import main
from transfer.common.run import run_stage

limit = psutil.Process().memory_info().vms + 4 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run_stage("train", lambda: main("finetuned"))
"""
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=project, env=environment(), text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "a step needs about" in done.stderr
    assert "Traceback" not in done.stderr


class TestAssets:
    def test_a_home_folder_that_no_shell_has_expanded(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        (tmp_path / "assets").mkdir()
        monkeypatch.setenv("ASSETS_DIR", os.path.join("~", "assets"))
        assert assets_dir() == tmp_path / "assets"

    def test_a_relative_folder_starts_at_the_project_in_temporary_copies_too(
        self, monkeypatch, tmp_path
    ):
        copy = tmp_path / "project/.dvc/tmp/exps/tmpabc"
        copy.mkdir(parents=True)
        (tmp_path / "assets").mkdir()
        monkeypatch.setenv("ASSETS_DIR", os.path.join("..", "assets"))
        for folder in (tmp_path / "project", copy):
            monkeypatch.chdir(folder)
            assert os.path.samefile(assets_dir(), tmp_path / "assets")

    @pytest.mark.parametrize("value", ["/nowhere/at/all", "~nobody-of-this-name/x", "params.yaml"])
    def test_what_is_no_folder_is_named(self, monkeypatch, value):
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("ASSETS_DIR", value)
        assert f"ASSETS_DIR = {value}: " in refusal(assets_dir)

    @pytest.mark.parametrize("value", [None, ""])
    def test_without_it_files_are_downloaded(self, monkeypatch, value):
        monkeypatch.delenv("ASSETS_DIR", raising=False)
        if value is not None:
            monkeypatch.setenv("ASSETS_DIR", value)
        assert assets_dir() is None


def test_an_experiment_that_a_shallow_clone_would_lose_is_refused_before_it_trains(
    project, tmp_path
):
    edit(project / "params.yaml", "views: 2", "views: 1")
    commit(project, "second commit")
    clone = tmp_path / "shallow"
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{project}", str(clone))
    output = dvc(clone, "exp", "run", "--temp", "-S", "seed=1", "download", fails=True)
    assert "is a shallow clone, in which DVC loses experiments" in output
    assert "git fetch --unshallow" in output


def test_the_error_of_a_stage_stands_once_at_the_end(project):
    edit(project / "params.yaml", "views: 2", "views: 0")
    done = stage(project, "train frozen")
    assert done.stderr.splitlines()[-1].startswith("error: params.yaml: train.frozen.views = 0")
