"""dvc.yaml names exactly what each stage imports and which settings it reads, as the code says."""

import ast
import importlib
import shutil
from modulefinder import ModuleFinder
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo
from dvc.utils.flatten import flatten
from helpers import ROOT, STAGES, set_params, with_settings

from transfer.settings import Section, load_params

TRAINED = {"train@frozen", "train@finetuned"}


def imported(path: str) -> set[str]:
    """The module at `path`, and those of the project that it imports, directly or not."""
    finder = ModuleFinder([str(ROOT)])
    finder.run_script(str(ROOT / path))
    files = [Path(module.__file__) for module in finder.modules.values() if module.__file__]
    return {file.relative_to(ROOT).as_posix() for file in files if file.name != "__init__.py"}


def sections(section: Section, prefix: str = "") -> dict[int, str]:
    """The identity of each section of the settings, and what stands before its keys."""
    found = {id(section): prefix}
    for name, value in section:
        found |= sections(value, f"{prefix}{name}.") if isinstance(value, Section) else {}
    return found


def test_the_committed_dvc_lock_has_the_stages_of_dvc_yaml():
    declared, locked = (
        yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))["stages"]
        for name in ("dvc.yaml", "dvc.lock")  # DVC keeps others in dvc.lock
    )
    modes = {f"train@{mode}" for mode in declared.pop("train")["foreach"]}
    assert set(locked) == modes | set(declared)


@pytest.mark.parametrize("package", ["stages", "transfer"])
def test_packages_hold_nothing_that_results_depend_on(package):
    """dvc.yaml does not name their __init__.py."""
    code = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    defines = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.ImportFrom
    assert [node for node in ast.walk(code) if isinstance(node, defines)] == []


@pytest.mark.parametrize("name", STAGES)
def test_deps_and_params_are_what_the_stage_imports_and_reads(project, monkeypatch, name):
    monkeypatch.chdir(project)
    monkeypatch.setattr("stages.train.PROJECT", project)
    # As DVC resolved dvc.yaml when it ran the stage.
    declared = yaml.safe_load(Path("dvc.lock").read_text(encoding="utf-8"))["stages"][name]
    stage, _, mode = name.partition("@")
    code = {dep["path"] for dep in declared["deps"] if dep["path"].endswith(".py")}
    assert code == imported(f"stages/{stage}.py")

    shutil.rmtree("stripes/test")  # test_share is read where there is no test split
    params = with_settings(load_params(), {"train.frozen.epochs": 2, "train.finetuned.epochs": 2})
    known, read = sections(params), set()

    def note(self, key):
        value = object.__getattribute__(self, key)
        if id(self) in known and key in type(self).model_fields and not isinstance(value, Section):
            read.add(known[id(self)] + key)
        return value

    module = importlib.import_module(f"stages.{stage}")
    monkeypatch.setattr(module, "load_params", lambda: params)
    monkeypatch.setattr(Section, "__getattribute__", note)
    module.main(*[mode] * bool(mode))
    assert read == set(flatten(declared.get("params", {}).get("params.yaml", {})))


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ("tools/demo.py", set()),
        ("transfer/figures.py", {"render"}),
        ("transfer/model.py", {"network", *TRAINED, "evaluate"}),
        ("weights/README.md", {"network"}),
        ("params.yaml", set()),  # a comment in it
        ({"model.image_size": 48}, {"download", "network"}),
        ({"train.launcher": "nice python"}, TRAINED),
        ({"train.finetuned.start": "new"}, {"train@finetuned"}),
        ({"train.frozen.views": 3, "figures.first_batch_size": 8}, {"train@frozen", "render"}),
    ],
)
def test_a_change_makes_stale_what_it_reaches_and_no_more(project, monkeypatch, changed, stale):
    monkeypatch.chdir(project)
    if isinstance(changed, dict):
        set_params(project, changed)
    else:
        with Path(changed).open("a", encoding="utf-8") as file:
            file.write("# changed\n")
    with Repo(str(project)) as repo:
        assert set(repo.status()) - {"settings"} == stale  # which checks params.yaml
