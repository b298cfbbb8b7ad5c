"""Whatever stands in params.yaml: taken as DVC takes it, or refused in one line by its key."""

import copy
import functools
import re
import string
import subprocess
import sys
from types import NoneType
from typing import get_args

import pytest
import torch
import yaml
from dvc.utils.serialize import dumps_yaml, loads_yaml
from helpers import ROOT, dvc, refusal
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from transfer.common.dataset import Split
from transfer.common.settings import MODES, Params, Section, load_params, merge
from transfer.inference import choose_device
from transfer.model import build
from transfer.training.loop import train

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")
GOOD = yaml.safe_load(TEXT)
many = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
faults = pytest.mark.faults


def load(folder, text: str) -> Params | str:
    """The settings, or the one line of the refusal."""
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return refusal(lambda: load_params(str(path))) or load_params(str(path))


def keys(section: dict, *above: str) -> list[tuple[str, ...]]:
    """Where each setting and each section of settings stands."""
    found = []
    for key, value in section.items():
        found.append((*above, key))
        if isinstance(value, dict):
            found += keys(value, *above, key)
    return found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"epochs": 3}}, ["train.epochs", "3", "unknown", "threads"]),
        ({"extra": 1}, ["extra", "unknown", "seed"]),
        ({"seed": -1}, ["seed = -1", "greater than or equal to 0"]),
        ({"seed": 1.5}, ["seed = 1.5", "integer"]),
        ({"seed": True}, ["seed = True", "integer"]),
        ({"data": {"test_share": 1.0}}, ["data.test_share = 1.0", "less than 1"]),
        ({"data": {"classes": ["cat"]}}, ["data", "['cat']", "two or more"]),
        ({"data": {"classes": ["cat", "cat"]}}, ["data", "two or more different"]),
        ({"data": {"classes": ["caf\u00e9", "cafe\u0301"]}}, ["data", "two or more different"]),
        ({"model": {"head": "mlp"}}, ["model.head = 'mlp'", "'conv' or 'linear'"]),
        ({"model": {"blocks": 0}}, ["model.blocks = 0", "greater than or equal to 1"]),
        ({"model": {"image_size": "64"}}, ["model.image_size = '64'", "integer"]),
        ({"model": None}, ["model = None"]),
        ({"train": {"device": "gpu"}}, ["train.device = 'gpu'", "'auto', 'cpu'"]),
        ({"train": {"threads": 0}}, ["train.threads = 0"]),
        ({"train": {"frozen": {"head_lr": 0}}}, ["train.frozen.head_lr = 0", "greater than 0"]),
        ({"train": {"frozen": {"head_lr": float("nan")}}}, ["train.frozen.head_lr", "finite"]),
        ({"train": {"frozen": {"epochs": 10**6}}}, ["train.frozen.epochs", "1000"]),
        ({"train": {"finetuned": {"backbone_lr": 0.5}}}, ["train.finetuned", "0.5", "below"]),
        ({"figures": {"first_batch_size": 401}}, ["figures.first_batch_size = 401", "400"]),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(tmp_path, changes, words):
    message = load(tmp_path, yaml.safe_dump(merge(GOOD, changes)))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "None"),
        ("[1, 2]", "[1, 2]"),
        ("seed: [", "not YAML"),
        ("seed: !!python/name:os.system", "not YAML"),
        (TEXT.replace("seed: 0", ""), "seed: is missing"),
        (TEXT.replace("seed: 0", "seed: 0\nseed: 1"), 'not YAML: found duplicate key "seed"'),
        ("\0", "not YAML"),
    ],
)
def test_a_bad_document_is_refused_in_one_line(tmp_path, text, words):
    assert words in load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("3e-4", ("train", "finetuned", "backbone_lr"), 3e-4),
        ("010", ("seed",), 10),
        ("0o10", ("seed",), 8),
        ("1_000", ("seed",), 1000),
        ("[yes, no]", ("data", "classes"), ["yes", "no"]),
        ("[on, 'null']", ("data", "classes"), ["on", "null"]),
        ("2001-01-01", ("model", "name"), None),
        ("yes", ("train", "bf16"), None),
    ],
)
def test_a_value_means_what_it_means_to_dvc(tmp_path, text, key, value):
    """YAML 1.2, not 1.1; None: refused, as it is no number, truth value or name to DVC either."""
    document = functools.reduce(lambda inner, name: {name: inner}, reversed(key), "VALUE")
    result = load(tmp_path, yaml.safe_dump(merge(GOOD, document)).replace("VALUE", text))
    if value is None:
        assert key[-1] in result
    else:
        assert functools.reduce(getattr, key, result) == value


@given(st.text("0123456789abefnosxyNOY_+-.:~ \"'", min_size=1, max_size=8))
@example("010")
@example("1e3")
@example("0b11")
@example("12:30:45")
@settings(many, max_examples=200)
def test_any_scalar_is_what_dvc_reads(tmp_path_factory, text):
    """What DVC records of a class's name or a seed is what the stages use, or it is refused."""
    folder = tmp_path_factory.getbasetemp()
    document = dumps_yaml(GOOD).replace("seed: 0", f"seed: {text}", 1)
    result = load(folder, document)
    if isinstance(result, Params):
        assert result.seed == loads_yaml(document)["seed"]


def test_classes_named_yes_and_no_can_be_set_from_the_command_line(project):
    dvc(project, "exp", "run", "-S", 'data.classes=["yes","no"]', fails=True)  # DVC writes bare yes
    assert load_params(str(project / "params.yaml")).data.classes == ["yes", "no"]


def bounds(field) -> list[str]:
    """How a comment says what a field of the settings may be."""
    limits = {}
    constraints = list(field.metadata)
    for part in get_args(field.annotation):  # an Annotated type that may also be null
        constraints += [c for info in getattr(part, "__metadata__", ()) for c in info.metadata]
    for constraint in constraints:
        for name in ("ge", "gt", "le", "lt"):
            if hasattr(constraint, name):
                limits[name] = getattr(constraint, name)
    said = ["null"] if NoneType in get_args(field.annotation) else []
    match limits:
        case {"ge": low, "lt": high}:
            said.append(f"{low:g} to {high - 1}")
        case {"ge": low, "le": high}:
            said.append(f"{low:g} to {high:g}")
        case {"gt": low, "le": high}:
            said.append(f"above {low:g}, at most {high:g}")
        case {"gt": low, "lt": high}:
            said.append(f"above {low:g}, below {high:g}")
        case {"ge": low}:
            said.append(f"at least {low:g}")
    return said + [value for value in get_args(field.annotation) if isinstance(value, str)]


def test_the_comments_state_the_bounds_of_the_code():
    comments = {}
    path = []
    for line in TEXT.splitlines():
        if found := re.match(r"( *)(\w+):", line):
            path = [*path[: len(found[1]) // 2], found[2]]
            comments[".".join(path)] = line.partition("#")[2]
    checked = 0

    def check(section: type[Section], above: str) -> None:
        nonlocal checked
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                check(field.annotation, f"{above}{name}.")
                continue
            for words in bounds(field):
                assert words in comments[above + name], f"{above}{name}: {words}"
                checked += 1

    check(Params, "")
    assert checked > 30


def test_the_check_by_itself_ends_with_status_1_and_one_line(tmp_path):
    load(tmp_path, TEXT.replace("seed: 0", "seed: x"))
    command = [sys.executable, "-m", "transfer.common.settings", str(tmp_path / "params.yaml")]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "seed = 'x'" in done.stderr


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.printable), inner, max_size=3)
    ),
    max_leaves=5,
)


@faults
@given(st.sampled_from(keys(GOOD)), values)
@settings(many, max_examples=300)
def test_any_value_is_taken_or_refused_by_its_key(tmp_path_factory, path, value):
    document = copy.deepcopy(GOOD)
    section = document
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    result = load(tmp_path_factory.getbasetemp(), yaml.safe_dump(document))
    # A rule between two settings of a section names the section and both.
    assert isinstance(result, Params) or path[-1] in result or "not YAML" in result, result


@faults
@given(st.sampled_from(keys(GOOD)))
@many
def test_a_missing_key_is_named(tmp_path_factory, path):
    document = copy.deepcopy(GOOD)
    section = document
    for key in path[:-1]:
        section = section[key]
    del section[path[-1]]
    result = load(tmp_path_factory.getbasetemp(), yaml.safe_dump(document))
    assert result.endswith(f"{'.'.join(path)}: is missing")


@faults
@given(st.text(string.ascii_letters + "_\n .", min_size=1), values)
@many
def test_an_unknown_key_is_named(tmp_path_factory, key, value):
    result = load(tmp_path_factory.getbasetemp(), dumps_yaml(GOOD | {key: value}))
    if key not in GOOD and isinstance(result, str) and "not YAML" not in result:
        assert key.strip("\n .").split("\n")[0] in result
        assert "unknown key" in result


@faults
@given(st.text() | st.text("{}[]:,-!&*|>'\"%@` \n\tab01.?~") | st.binary().map(str))
@settings(many, max_examples=300)
@pytest.mark.parametrize(
    "around", ["{}", "seed: {}", "{}: 1", "seed: !!int {}", "- !!timestamp {}"]
)
def test_any_text_is_refused_in_one_line(tmp_path_factory, around, text):
    result = load(tmp_path_factory.getbasetemp(), around.replace("{}", text))
    assert isinstance(result, str)
    assert result.split(": ")[1]


small = st.fixed_dictionaries(
    {
        "blocks": st.integers(1, 14) | st.none(),
        "head": st.sampled_from(["conv", "linear"]),
        "head_width": st.integers(1, 64),
        "image_size": st.integers(16, 48),
    }
)
shared = st.fixed_dictionaries(
    {
        "batch_size": st.integers(2, 90),
        "label_smoothing": st.floats(0, 0.9),
        "weight_decay": st.floats(0, 1),
        "max_shift": st.integers(0, 31),
        "muon_lr": st.floats(0, 1, exclude_min=True),
        "warm_up": st.floats(0, 1),
    }
)
share = st.floats(0, 1, exclude_min=True)
REASONS = ["model.blocks", "model.image_size", "batch_size", "initial_scale", "learning rates"]


@faults
@given(small, shared, share, share)
@settings(many, max_examples=25)
def test_what_is_taken_runs_or_is_refused_by_its_key(
    tmp_path_factory, of_model, of_both, head_lr, part
):
    changes = {
        "model": of_model | {"weights": None},
        "train": {
            "shared": of_both,
            "frozen": {"epochs": 1, "views": 1, "head_lr": head_lr},
            "finetuned": {
                "epochs": 2, "head_lr": head_lr, "backbone_lr": head_lr * part,
                "initial_scale": part,
            },
        },
    }  # fmt: skip
    params = load(tmp_path_factory.getbasetemp(), yaml.safe_dump(merge(GOOD, changes)))
    if isinstance(params, str):
        assert "backbone_lr" in params
        return
    images = torch.randint(0, 256, (80, 32, 32, 3), dtype=torch.uint8)
    data = Split(images, torch.arange(80) % 10)
    device = choose_device("cpu", 1)

    def run(mode: str, log) -> None:
        train(build(params.model, 10), mode, data, data, params, device, log)

    for mode in MODES:
        logged = []
        message = refusal(functools.partial(run, mode, lambda *row, to=logged: to.append(row)))
        if message:
            assert any(reason in message for reason in REASONS), message
        else:
            assert len(logged) == getattr(params.train, mode).epochs
