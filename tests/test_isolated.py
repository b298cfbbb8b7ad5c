"""What tools start in a folder of their own is not told where another repository is."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, refusal

from tools import demo
from tools.isolated import environment, git


@pytest.fixture
def users(tmp_path):
    """A repository of someone's, with one commit."""
    folder = tmp_path / "users"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    git(folder, "init", "--quiet", "--initial-branch", "main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "mine")
    return folder


def state(folder) -> tuple[str, ...]:
    commands = ("log --format=%H --all", "config --local --list", "status --porcelain", "ls-files")
    return tuple(git(folder, *command.split()) for command in commands)


@pytest.mark.parametrize("variable", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "all"])
def test_a_hook_of_the_users_repository_is_no_place_to_commit_to(
    users, tmp_path, monkeypatch, variable
):
    before = state(users)
    places = {
        "GIT_DIR": users / ".git", "GIT_WORK_TREE": users, "GIT_INDEX_FILE": users / ".git/index",
        "GIT_OBJECT_DIRECTORY": users / ".git/objects", "GIT_PREFIX": "", "GIT_COMMON_DIR": users,
    }  # fmt: skip
    for name, value in places.items() if variable == "all" else [(variable, places[variable])]:
        monkeypatch.setenv(name, str(value))
    demo.make_project(tmp_path / "demo", 20, 20)
    assert state(users) == before
    assert "generated" in git(tmp_path / "demo", "log", "--format=%s")


@pytest.mark.parametrize(
    "settings",
    [
        "[commit]\n\tgpgsign = true\n[gpg]\n\tprogram = false",
        "[core]\n\thooksPath = HOOKS",
        "[init]\n\ttemplateDir = HOOKS",
        "[core]\n\tautocrlf = true\n\tsafecrlf = true",
        "[commit]\n\ttemplate = /nowhere\n[user]\n\tuseConfigOnly = true",
    ],
)
def test_the_users_commit_settings_do_not_count(tmp_path, monkeypatch, settings):
    hooks = tmp_path / "hooks"
    (hooks / "hooks").mkdir(parents=True)
    for path in (hooks / "pre-commit", hooks / "hooks/pre-commit"):
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)
    (tmp_path / ".gitconfig").write_text(settings.replace("HOOKS", str(hooks)))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    demo.make_project(tmp_path / "demo", 20, 20)
    assert git(tmp_path / "demo", "status", "--porcelain") == ""
    assert b"\r\n" not in (tmp_path / "demo/params.yaml").read_bytes()


def test_the_demo_needs_no_repository_around_it(tmp_path):
    """... as in an unpacked archive; and its environment names no launcher of several processes."""
    for part in demo.PARTS:
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    code = "import pathlib; from tools import demo; demo.make_project(pathlib.Path('made'), 20, 20)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "made/dvc.yaml").is_file()


def test_a_failing_git_is_one_line(tmp_path):
    assert "git log in" in refusal(lambda: git(tmp_path, "log"))


def test_no_launcher_and_no_assets_are_passed_on(monkeypatch, tmp_path):
    names = {"WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID", "DVC_STAGE", "GIT_DIR"}
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("ASSETS_DIR", str(tmp_path))
    assert not (names | {"ASSETS_DIR"}) & set(environment())
    assert environment(assets=True)["ASSETS_DIR"] == str(tmp_path)
