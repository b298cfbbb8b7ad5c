"""dvc.yaml names exactly what each stage imports and which settings it reads, as the code says."""

import ast
import importlib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from transfer import params
from transfer.params import Section

STAGES = ["download", "backbone", "train@frozen", "train@finetuned", "evaluate", "render"]


def imported(path: Path) -> set[Path]:
    """The project's files that the one at `path` imports, directly or through another, and it."""
    found, todo = set(), {path}
    while todo:
        current = todo.pop()
        found.add(current)
        for node in ast.walk(ast.parse((ROOT / current).read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            files = {Path(name.replace(".", "/") + ".py") for name in names}
            todo |= {file for file in files if (ROOT / file).is_file()} - found
    return found


class Recorder:
    """Stands for a section of the settings and notes the key of each value that is read."""

    def __init__(self, section: Section, read: set[str], prefix: str = ""):
        self._section, self._read, self._prefix = section, read, prefix

    def __getattr__(self, name: str):
        value = getattr(self._section, name)
        if isinstance(value, Section):
            return Recorder(value, self._read, f"{self._prefix}{name}.")
        self._read.add(self._prefix + name)
        return value


def leaves(key: str, value) -> set[str]:
    """The dotted keys of the settings that are in `value`, which stands at `key`."""
    if not isinstance(value, dict):
        return {key}
    return set().union(*(leaves(f"{key}.{name}", inner) for name, inner in value.items()))


@pytest.fixture(scope="module")
def lock(reproduced) -> dict[str, dict]:
    """Each stage with its deps and params, as DVC resolved them when it ran the stage."""
    return yaml.safe_load((reproduced / "dvc.lock").read_text())["stages"]


@pytest.mark.parametrize("name", STAGES)
def test_deps_are_the_modules_that_the_stage_imports(lock, name):
    declared = {Path(dep["path"]) for dep in lock[name]["deps"] if dep["path"].endswith(".py")}
    assert declared == imported(Path("stages", name.partition("@")[0] + ".py"))


@pytest.mark.parametrize("name", STAGES)
def test_params_are_the_settings_that_the_stage_reads(lock, project, monkeypatch, name):
    stage, _, mode = name.partition("@")
    module = importlib.import_module(f"stages.{stage}")
    monkeypatch.chdir(project)
    read = set()
    recorder = Recorder(params.load(), read)
    monkeypatch.setattr(params, "load", lambda: recorder)
    module.main(mode) if mode else module.main()
    declared = set()
    for key, value in lock[name].get("params", {}).get("params.yaml", {}).items():
        declared |= leaves(key, value)
    assert declared == read
