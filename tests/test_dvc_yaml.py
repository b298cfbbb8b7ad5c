"""dvc.yaml names exactly what each stage imports and which settings it reads, as the code says."""

import ast
import functools
import importlib
import json
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, STAGES, dvc, edit

from transfer.common.settings import Section, load_params

# What transfer/__init__.py does.
THREADS = [
    "os.environ.setdefault('GOMP_SPINCOUNT', '3000')",
    "for name in ('OMP_THREAD_LIMIT', 'OMP_DYNAMIC', 'OMP_MAX_ACTIVE_LEVELS'):",
    "    os.environ.pop(name, None)",
]


@functools.cache
def imported(path: Path) -> frozenset[Path]:
    """The project's files that the one at `path` imports, directly or through another, and it."""
    found, todo = set(), {path}
    while todo:
        current = todo.pop()
        found.add(current)
        for node in ast.walk(ast.parse((ROOT / current).read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            files = {Path(name.replace(".", "/") + ".py") for name in names}
            todo |= {file for file in files if (ROOT / file).is_file()} - found
    return frozenset(found)


def modules(dependency: str) -> set[Path]:
    """The project's modules that a dependency is, or holds."""
    path = ROOT / dependency
    files = path.rglob("*.py") if path.is_dir() else [path] if path.suffix == ".py" else []
    return {file.relative_to(ROOT) for file in files if file.name != "__init__.py"}


def test_packages_hold_nothing_that_results_depend_on():
    """dvc.yaml does not name their __init__.py."""
    for path in (*ROOT.glob("stages/**/__init__.py"), *ROOT.glob("transfer/**/__init__.py")):
        code = ast.unparse(ast.parse(path.read_text(encoding="utf-8"))).splitlines()
        assert [line for line in code if not line.startswith(("import ", '"""'))] in ([], THREADS)


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


def test_dvc_lock_has_no_stage_that_dvc_yaml_has_not():
    committed = yaml.safe_load((ROOT / "dvc.lock").read_text(encoding="utf-8"))  # DVC keeps them
    assert sorted(committed["stages"]) == sorted(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_deps_are_the_modules_that_the_stage_imports(lock, name):
    declared = set().union(*(modules(dep["path"]) for dep in lock[name]["deps"]))
    assert declared == imported(Path("stages", name.partition("@")[0] + ".py"))


# A section is named as a whole, with the one setting in it that these stages do not read: another
# path to the same weights runs them again for nothing, which is the price of a short dvc.yaml.
NOT_READ = {"train": {"model.weights"}, "evaluate": {"model.weights"}}


@pytest.mark.parametrize("name", STAGES)
def test_params_are_the_settings_that_the_stage_reads(lock, project, monkeypatch, name):
    stage, _, mode = name.partition("@")
    module = importlib.import_module(f"stages.{stage}")
    monkeypatch.chdir(project)
    read = set()
    recorder = Recorder(load_params(), read)
    monkeypatch.setattr(module, "load_params", lambda: recorder)
    module.main(mode) if mode else module.main()
    declared = set()
    for key, value in lock[name].get("params", {}).get("params.yaml", {}).items():
        declared |= leaves(key, value)
    assert declared - read == NOT_READ.get(stage, set())
    assert read <= declared


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("transfer/figures.py", "#0072B2", "#000000", {"render"}),
        ("transfer/metrics.py", "BINS = 15", "BINS = 10", {"evaluate"}),
        ("transfer/fetch.py", "TRIES = 4", "TRIES = 5", {"download", "network"}),
        ("transfer/sources/folders.py", "SHOWN = 10", "SHOWN = 9", {"download"}),
        ("transfer/pretrained.py", '"model_state"', '"model_states"', {"network"}),
        ("transfer/architecture.py", "THE ORIGINAL", "ORIGINAL", {"network"}),
        ("transfer/training/loop.py", "math.isfinite", "(math.isfinite)",
         {"train@frozen", "train@finetuned"}),
        ("transfer/inference.py", "CHUNK = 256", "CHUNK = 128",
         {"train@frozen", "train@finetuned", "evaluate"}),
        ("transfer/model.py", "2 * width", "width * 2",
         {"network", "train@frozen", "train@finetuned", "evaluate"}),
        ("transfer/common/errors.py", "error: {", "Error: {", set(STAGES)),
        ("params.yaml", "views: 2", "views: 3", {"train@frozen"}),
        ("params.yaml", "max_shift: 4", "max_shift: 3", {"train@frozen", "train@finetuned"}),
        ("params.yaml", "first_batch_size: 16", "first_batch_size: 8", {"render"}),
        ("params.yaml", "test_share: 0.2", "test_share: 0.3", {"download"}),
        ("params.yaml", "launcher: python", "launcher: nice python",
         {"train@frozen", "train@finetuned"}),
    ],
)  # fmt: skip
def test_a_change_makes_stale_what_it_reaches_and_no_more(project, file, old, new, changed):
    edit(project / file, old, new)
    assert set(json.loads(dvc(project, "status", "--json"))) == changed
