"""Whatever stands in params.yaml: taken as DVC takes it, or refused in one line by its key."""

import functools
import operator
import re

import pytest
import torch
import yaml
from dvc.utils.serialize import dumps_yaml, loads_yaml
from helpers import ROOT, dvc, python, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from transfer.common.dataset import Split
from transfer.common.settings import MODES, Params, load_params
from transfer.model import build
from transfer.training.loop import train
from transfer.training.modes import make_mode

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")
COMMENTS: dict[str, str] = {}  # of each key, for example "train.threads"
for line in TEXT.splitlines():
    if found := re.match(r"( *)(\w+):", line):
        above = list(COMMENTS)[-1].split(".")[: len(found[1]) // 2] if found[1] else []
        COMMENTS[".".join([*above, found[2]])] = line.partition("#")[2]
LIMITS = {  # how a comment states a bound of the JSON schema
    "minimum": r"(at least {0:g}|\b{0:g} to )",
    "exclusiveMinimum": r"above {0:g}\b",
    "maximum": r"(at most| to) {0:g}\b",
    "exclusiveMaximum": r"(below {0:g}| to {1})\b",
}
many = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
texts = st.text("0123456789abefnosxyNOY_+-.:~ \"'", min_size=1, max_size=8) | st.text()
texts |= st.text("{}[]:,-!&*|>'\"%@` \n\tab01.?~")
share = st.floats(0, 1, exclude_min=True)
RUNS = {
    "model.blocks": st.integers(1, 14) | st.none(),
    "model.head": st.sampled_from(["conv", "linear"]),
    "model.head_width": st.integers(1, 64),
    "model.image_size": st.integers(16, 48),
    "train.shared.batch_size": st.integers(2, 90),
    "train.shared.min_steps": st.integers(1, 9),
    "train.shared.max_shift": st.integers(0, 31),
    "train.frozen.muon_lr": share,
    "train.shared.warm_up": st.floats(0, 1),
    "train.frozen.head_lr": share,
    "train.finetuned.head_lr": share,
    "train.finetuned.backbone_lr": share,
    "train.finetuned.initial_scale": share,
}
QUICK = {"train.frozen.epochs": 1, "train.frozen.views": 1, "train.finetuned.epochs": 2}
REASONS = "model.blocks|model.image_size|batch_size|initial_scale|learning rates|backbone_lr must"


def load(folder, text: str) -> Params | str:
    """The settings, or the one line of the refusal."""
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return refusal(lambda: load_params(str(path))) or load_params(str(path))


def changed(changes: dict) -> str:
    """params.yaml as DVC would write it, with other values of some keys."""
    document = yaml.safe_load(TEXT)
    for key, value in changes.items():
        *above, name = key.split(".")
        functools.reduce(operator.getitem, above, document)[name] = value
    return dumps_yaml(document)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("seed", "010", 10),  # YAML 1.2, as DVC reads it, not 1.1
        ("train.finetuned.backbone_lr", "3e-4", 3e-4),
        ("data.classes", "[yes, on, 'null']", ["yes", "on", "null"]),
        ("train.bf16", "yes", "train.bf16 = 'yes': must be a valid boolean"),
        ("model.name", "2001-01-01", "model.name = datetime.*: must be a valid string"),
        ("seed", "-1", "seed = -1: must be greater than or equal to 0"),
        ("seed", "true", "seed = True: must be a valid integer"),
        ("seed", "0\nseed: 1", 'not YAML: found duplicate key "seed"'),
        ("seed", "[", r"not YAML: .* \(line \d\)"),
        ("seed", "!!python/name:os.system", "not YAML: "),
        ("seed", "\ud800", "cannot be read: "),
        ("data.classes", "[cat]", "data = {.*: classes must be null or two or more different"),
        ("data.classes", "[caf\u00e9, cafe\u0301]", "two or more different"),
        ("model.name", "''", "model.name = '': .* at least 1 character"),
        ("train.frozen.head_lr", ".nan", "train.frozen.head_lr = nan: must be a finite"),
        ("train.finetuned.backbone_lr", "0.5", 0.5),  # above head_lr: a sweep shows what it costs
    ],
)
def test_a_value_means_what_it_means_to_dvc_or_is_refused(tmp_path, key, text, expected):
    result = load(tmp_path, changed({key: "VALUE"}).replace("VALUE", text))
    if isinstance(result, str):
        assert re.search(f"params.yaml: .*{expected}", result)
    else:
        assert operator.attrgetter(key)(result) == expected


@pytest.mark.parametrize("key", COMMENTS)
def test_each_key_is_named_where_it_is_missing_or_wrong_or_misspelt(tmp_path, key):
    above, dot, name = key.rpartition(".")
    wrong = load(tmp_path, changed({key: [[1]]}))
    assert re.search(rf"params.yaml: {key}\b.* = .*: must be ", wrong)
    unknown = load(tmp_path, changed({f"{above}{dot}misspelt": 1}))
    assert re.search(rf"{above}{dot}misspelt = 1: unknown key; allowed here: .*{name}", unknown)
    document = yaml.safe_load(TEXT)
    del functools.reduce(operator.getitem, above.split(".") if dot else [], document)[name]
    assert load(tmp_path, dumps_yaml(document)).endswith(f"params.yaml: {key}: is missing")


@given(st.sampled_from(list(COMMENTS)), texts)
@settings(many, max_examples=200)
def test_any_scalar_is_what_dvc_reads_or_is_refused(tmp_path_factory, key, text):
    document = changed({key: "VALUE"}).replace("VALUE", text)
    result = load(tmp_path_factory.getbasetemp(), document)
    if isinstance(result, Params):
        read = functools.reduce(operator.getitem, key.split("."), loads_yaml(document))
        assert operator.attrgetter(key)(result) == read


def test_classes_named_yes_and_no_can_be_set_from_the_command_line(project):
    dvc(project, "exp", "run", "-S", 'data.classes=["yes","no"]', fails=True)  # DVC writes bare yes
    assert load_params(str(project / "params.yaml")).data.classes == ["yes", "no"]


@pytest.mark.parametrize("text", ["", "[1, 2]"])
def test_without_settings_the_check_ends_with_status_1_and_one_line(tmp_path, text):
    load(tmp_path, text)
    done = python(ROOT, "-m", "transfer.common.settings", tmp_path / "params.yaml")
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*params.yaml: the document = .*: must .*\n", done.stderr)


def test_the_comments_state_the_bounds_of_the_code():
    stated = []
    for key in COMMENTS:
        *above, name = key.split(".")
        section = functools.reduce(lambda s, name: s.model_fields[name].annotation, above, Params)
        schema = TypeAdapter(section.model_fields[name].rebuild_annotation()).json_schema()
        for part in schema.get("anyOf", [schema]):
            stated += [(key, LIMITS[k].format(v, v - 1)) for k, v in part.items() if k in LIMITS]
            words = ["null"] if part["type"] == "null" else part.get("enum", [])
            stated += [(key, word) for word in words]
    assert len(stated) > 50
    assert [(key, words) for key, words in stated if not re.search(words, COMMENTS[key])] == []


@pytest.mark.faults
@given(st.fixed_dictionaries(RUNS))
@settings(many, max_examples=40)
def test_what_is_taken_runs_or_is_refused_by_its_key(tmp_path_factory, drawn):
    params = load(tmp_path_factory.getbasetemp(), changed(QUICK | drawn))
    data = Split(torch.randint(0, 256, (80, 32, 32, 3), dtype=torch.uint8), torch.arange(80) % 10)
    rows = []

    def run() -> None:
        for mode in MODES:
            learning = make_mode(mode, build(params.model, 10), data, params, torch.device("cpu"))
            rows.extend(train(learning, data))

    message = params if isinstance(params, str) else refusal(run)
    assert re.search(REASONS, message) if message else len(rows) == 3
