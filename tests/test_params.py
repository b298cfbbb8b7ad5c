import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from tools.demo import merge
from transfer import params
from transfer.errors import InputError

GOOD = (ROOT / "params.yaml").read_text()


def changed(tmp_path, changes: dict) -> str:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(merge(yaml.safe_load(GOOD), changes)))
    return str(path)


def test_the_committed_settings_are_good():
    assert params.load(str(ROOT / "params.yaml")).model.blocks == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"epochs": 3}}, ["train.epochs", "3", "unknown", "batch_size"]),
        ({"extra": 1}, ["extra", "unknown", "seed"]),
        ({"seed": -1}, ["seed = -1", "greater than or equal to 0"]),
        ({"seed": 1.5}, ["seed = 1.5", "integer"]),
        ({"seed": True}, ["seed = True", "integer"]),
        ({"data": {"validation": 0}}, ["data.validation = 0", "1"]),
        ({"data": {"classes": ["cat"]}}, ["data", "['cat']", "two or more"]),
        ({"data": {"classes": ["cat", "cat"]}}, ["data", "two or more different"]),
        ({"model": {"head": "mlp"}}, ["model.head = 'mlp'", "'conv' or 'linear'"]),
        ({"model": {"blocks": 0}}, ["model.blocks = 0", "greater than or equal to 1"]),
        ({"model": {"image_size": "64"}}, ["model.image_size = '64'", "integer"]),
        ({"model": None}, ["model = None"]),
        ({"train": {"device": "gpu"}}, ["train.device = 'gpu'", "'auto', 'cpu' or 'cuda'"]),
        ({"train": {"threads": 0}}, ["train.threads = 0"]),
        ({"train": {"frozen": {"head_lr": 0}}}, ["train.frozen.head_lr = 0", "greater than 0"]),
        ({"train": {"frozen": {"head_lr": float("nan")}}}, ["train.frozen.head_lr", "finite"]),
        ({"train": {"frozen": {"epochs": 10**6}}}, ["train.frozen.epochs", "1000"]),
        ({"train": {"finetuned": {"backbone_lr": 0.5}}}, ["train.finetuned", "0.5", "below"]),
        ({"evaluate": {"batch_size": 401}}, ["evaluate.batch_size = 401", "400"]),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(tmp_path, changes, words):
    with pytest.raises(InputError) as error:
        params.load(changed(tmp_path, changes))
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "None"),
        ("[1, 2]", "[1, 2]"),
        ("seed: [", "not YAML"),
        (GOOD.replace("seed: 0", ""), "seed: is missing"),
        (GOOD.replace("seed: 0", "seed: 0\nseed: 1"), "'seed' stands twice"),
        ("\0", "not YAML"),
    ],
)
def test_a_bad_document_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        params.load(str(tmp_path / "params.yaml"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_are_read_as_dvc_reads_them(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(GOOD.replace("backbone_lr: 2.0e-3", "backbone_lr: 3e-4"))
    assert params.load(str(path)).train.finetuned.backbone_lr == 3e-4


def test_the_check_by_itself_ends_with_status_1_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "transfer.params", changed(tmp_path, {"seed": "x"})],
        cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "seed = 'x'" in done.stderr
