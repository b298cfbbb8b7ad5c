"""Whatever stands in params.yaml: taken as DVC takes it, or refused in one line by its key."""

import functools
import operator
import re
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import dumps_yaml
from helpers import ROOT, changed, python, refusal
from pydantic import TypeAdapter

from transfer.settings import Params, load_params

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")
DOCUMENT = yaml.safe_load(TEXT)
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


def load(folder: Path, text: str) -> Params | str:
    """The settings, or the one line of the refusal."""
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return refusal(lambda: load_params(str(path))) or load_params(str(path))


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("seed", "010", 10),  # YAML 1.2, as DVC reads it, not 1.1
        ("train.finetuned.backbone_lr", "3e-4", 3e-4),
        ("train.finetuned.backbone_lr", "0.5", 0.5),  # above head_lr: a sweep shows what it costs
        ("data.classes", "[yes, on, 'null']", ["yes", "on", "null"]),
        ("train.shared.flip", "yes", "train.shared.flip = 'yes': must be a valid boolean"),
        ("model.name", "2001-01-01", "model.name = datetime.*: must be a valid string"),
        ("model.name", "''", "model.name = '': .* at least 1 character"),
        ("seed", "-1", "seed = -1: must be greater than or equal to 0"),
        ("seed", "true", "seed = True: must be a valid integer"),
        ("seed", "0\nseed: 1", 'not YAML: .*found duplicate key "seed"'),
        ("seed", "[", r"not YAML: .*, line \d+"),
        ("seed", "!!python/name:os.system", "not YAML: "),
        ("seed", "\ud800", "not YAML: "),
        ("data.classes", "[cat]", "data = {.*: .*take null, or two or more different names"),
        ("train.frozen.head_lr", ".nan", "train.frozen.head_lr = nan: must be a finite"),
        ("train.frozen", "8", "train.frozen = 8: must be a valid dictionary"),
    ],
)
def test_a_value_means_what_it_means_to_dvc_or_is_refused(tmp_path, key, text, expected):
    result = load(tmp_path, dumps_yaml(changed(DOCUMENT, {key: "VALUE"})).replace("VALUE", text))
    if isinstance(result, str):
        assert re.search(f"params.yaml: {expected}", result), result
    else:
        assert operator.attrgetter(key)(result) == expected


@pytest.mark.parametrize("key", COMMENTS)
def test_each_key_is_named_where_it_is_missing_or_wrong_or_misspelt(tmp_path, key):
    above, dot, name = key.rpartition(".")
    wrong = load(tmp_path, dumps_yaml(changed(DOCUMENT, {key: [[1]]})))
    assert re.search(rf"params.yaml: {key}\b.* = .*: must be ", wrong)
    unknown = load(tmp_path, dumps_yaml(changed(DOCUMENT, {f"{above}{dot}misspelt": 1})))
    assert re.search(rf"params.yaml: {above}{dot}misspelt = 1: .*not permitted$", unknown)
    document = yaml.safe_load(TEXT)
    del functools.reduce(operator.getitem, above.split(".") if dot else [], document)[name]
    assert load(tmp_path, dumps_yaml(document)).endswith(f"params.yaml: {key} is missing")


def test_all_wrong_keys_are_named_at_once_in_one_line(tmp_path):
    document = changed(DOCUMENT, {"train.threads": 0, "model.head": "x", "train.frozen.epoch": 1})
    del document["seed"]
    found = load(tmp_path, dumps_yaml(document)).partition("params.yaml: ")[2].split("; ")
    keys = {re.split(" = | is ", problem)[0] for problem in found}
    assert keys == {"seed", "model.head", "train.threads", "train.frozen.epoch"}


def test_classes_named_yes_and_no_can_be_set_with_dvc_exp_run(tmp_path):
    load(tmp_path, TEXT)
    apply_overrides(tmp_path / "params.yaml", ['data.classes=["yes","no"]'])  # the option -S
    assert load_params(str(tmp_path / "params.yaml")).data.classes == ["yes", "no"]


def test_the_check_of_the_settings_ends_with_status_1_and_one_line(tmp_path):
    for text, words in (
        ("", "the document = None: must be a valid dictionary"),
        (TEXT.replace("seed: 0", "seed: -1"), "seed = -1: must be greater than or equal to 0"),
    ):
        (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
        done = python(ROOT, "-m", "transfer.settings", tmp_path / "params.yaml")
        assert done.returncode == 1
        assert re.fullmatch(f"error: .*params.yaml: {words}.*\\n", done.stderr)
    assert python(ROOT, "-m", "transfer.settings").returncode == 0


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
