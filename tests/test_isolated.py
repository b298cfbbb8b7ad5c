"""What tools start in a folder of their own has nothing of where they were started."""

import shutil

import pytest
from helpers import ROOT, commit, contents, python

from tools import demo
from tools.isolated import environment, git

PLACES = {"GIT_DIR": ".git", "GIT_INDEX_FILE": ".git/index", "GIT_OBJECT_DIRECTORY": ".git/objects"}


@pytest.mark.parametrize("name", PLACES)
def test_a_repository_whose_hook_starts_a_tool_stays_as_it_is(tmp_path, monkeypatch, name):
    (tmp_path / "users").mkdir()
    (tmp_path / "users/mine.txt").touch()
    git(tmp_path / "users", "init", "--quiet")
    commit(tmp_path / "users", "mine")
    before = contents(tmp_path / "users")
    monkeypatch.setenv(name, str(tmp_path / "users" / PLACES[name]))
    demo.make_project(tmp_path / "demo", 20, 20)
    assert contents(tmp_path / "users") == before


def test_the_users_settings_of_git_do_not_count(tmp_path, monkeypatch):
    settings = "[commit]\n\tgpgsign = true\n[gpg]\n\tprogram = false"
    (tmp_path / ".gitconfig").write_text(settings, encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    demo.make_project(tmp_path / "demo", 20, 20)
    assert "generated" in git(tmp_path / "demo", "log")


def test_the_demo_needs_no_repository_around_it(tmp_path):
    for part in demo.PARTS:
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, tmp_path / part)
    code = "import pathlib; from tools import demo; demo.make_project(pathlib.Path('made'), 20, 20)"
    done = python(tmp_path, "-c", code)
    assert (tmp_path / "made/dvc.yaml").is_file(), done.stderr


def test_no_git_dvc_or_launcher_is_passed_on_and_assets_are_found_from_anywhere(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "DVC_STAGE", "GIT_DIR", "ASSETS_DIR"):
        monkeypatch.setenv(name, "here")
    assert not {"TORCHELASTIC_RUN_ID", "DVC_STAGE", "GIT_DIR"} & environment().keys()
    assert environment()["ASSETS_DIR"] == str(ROOT / "here")
