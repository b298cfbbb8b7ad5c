"""Whatever stands in params.yaml: it runs, or it is refused in one line that names the key."""

import copy
import functools
import string

import pytest
import torch
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transfer import data, model, params, training
from transfer.errors import InputError

GOOD = yaml.safe_load((ROOT / "params.yaml").read_text())
many = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def paths(section: dict, *above: str) -> list[tuple[str, ...]]:
    """Where each setting and each section of settings stands."""
    found = []
    for key, value in section.items():
        found.append((*above, key))
        if isinstance(value, dict):
            found += paths(value, *above, key)
    return found


def refusal(action) -> str | None:
    """The one line with which `action` is refused, if it is."""
    try:
        action()
    except InputError as error:
        message = str(error)
    else:
        return None
    assert "\n" not in message
    return message


def load(path, text: str) -> params.Params | str:
    """The settings, or the one line of the refusal."""
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return refusal(lambda: params.load(str(path))) or params.load(str(path))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.printable), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.sampled_from(paths(GOOD)), values)
@settings(many, max_examples=300)
def test_any_value_is_taken_or_refused_by_its_key(tmp_path_factory, path, value):
    document = copy.deepcopy(GOOD)
    section = document
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    result = load(tmp_path_factory.getbasetemp() / "value.yaml", yaml.safe_dump(document))
    # A rule between two settings of a section names the section and both.
    assert isinstance(result, params.Params) or path[-1] in result, result


@given(st.sampled_from(paths(GOOD)))
@many
def test_a_missing_key_is_named(tmp_path_factory, path):
    document = copy.deepcopy(GOOD)
    section = document
    for key in path[:-1]:
        section = section[key]
    del section[path[-1]]
    result = load(tmp_path_factory.getbasetemp() / "missing.yaml", yaml.safe_dump(document))
    assert result.endswith(f"{'.'.join(path)}: is missing")


@given(st.text(string.ascii_letters + "_\n .", min_size=1), values)
@many
def test_an_unknown_key_is_named(tmp_path_factory, key, value):
    document = GOOD | {key: value}
    result = load(tmp_path_factory.getbasetemp() / "unknown.yaml", yaml.safe_dump(document))
    if key not in GOOD:
        assert " ".join(key.split()) in result
        assert "unknown key" in result


@given(st.text() | st.text("{}[]:,-!&*|>'\"%@` \n\tab01.?~") | st.binary().map(str))
@settings(many, max_examples=300)
@pytest.mark.parametrize(
    "around", ["{}", "seed: {}", "{}: 1", "seed: !!int {}", "- !!timestamp {}"]
)
def test_any_text_is_refused_in_one_line(tmp_path_factory, around, text):
    result = load(tmp_path_factory.getbasetemp() / "text.yaml", around.replace("{}", text))
    assert isinstance(result, str)
    assert result.split(": ")[1]


small = (
    st.fixed_dictionaries(
        {
            "blocks": st.integers(1, 14) | st.none(),
            "head": st.sampled_from(["conv", "linear"]),
            "image_size": st.integers(16, 48),
        }
    ),
    st.fixed_dictionaries(
        {
            "batch_size": st.integers(2, 90),
            "label_smoothing": st.floats(0, 0.9),
            "weight_decay": st.floats(0, 1),
            "crop": st.integers(0, 31),
        }
    ),
)


share = st.floats(0, 1, exclude_min=True)
REASONS = ["model.blocks", "model.image_size", "train.batch_size", "first_size", "learning_rates"]


@given(*small, share, share)
@settings(many, max_examples=25)
def test_what_is_taken_runs_or_is_refused_by_its_key(
    tmp_path_factory, of_model, of_train, head_lr, part
):
    document = copy.deepcopy(GOOD)
    document["model"] |= of_model | {"weights": None}
    document["train"] |= of_train
    document["train"]["frozen"] |= {"epochs": 1, "views": 1, "head_lr": head_lr}
    document["train"]["finetuned"] |= {
        "epochs": 2,
        "head_lr": head_lr,
        "backbone_lr": head_lr * part,
        "first_size": part,
    }
    loaded = load(tmp_path_factory.getbasetemp() / "small.yaml", yaml.safe_dump(document))
    if isinstance(loaded, str):
        assert "backbone_lr" in loaded
        return
    images = torch.randint(0, 256, (80, 32, 32, 3), dtype=torch.uint8)
    pictures = data.Split(images, torch.arange(80) % 10)
    device = training.set_up("cpu", 1)

    def run(mode: str, log) -> None:
        network = model.build(loaded.model, 10)
        training.train(network, mode, pictures, pictures, loaded, device, log)

    for mode in params.MODES:
        logged = []
        message = refusal(functools.partial(run, mode, lambda *row, to=logged: to.append(row)))
        if message:
            assert any(reason in message.replace(" ", "_") for reason in REASONS), message
        else:
            assert len(logged) == getattr(loaded.train, mode).epochs
