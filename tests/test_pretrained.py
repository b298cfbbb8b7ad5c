"""Pretrained weights: the official ones are checked, one's own are taken as people have them."""

import functools
import re

import pytest
import safetensors.torch
import torch
import torchvision
from helpers import ROOT, dvc, refusal, set_params
from torch import nn

from transfer.common.settings import load_params
from transfer.model import classifier
from transfer.model import build, fill
from transfer.pretrained import pretrained, read_state_dict


@pytest.fixture
def features():
    torch.manual_seed(0)
    state = classifier("mobilenet_v3_small").state_dict()
    return {key: value for key, value in state.items() if key.startswith("features.")}


@pytest.fixture
def network():
    return build(load_params(str(ROOT / "params.yaml")).model, 10)


@pytest.fixture
def read(tmp_path, network):
    """What the backbone gets from an object that is saved as weights/mine.pth."""

    def read(content, save=torch.save) -> dict[str, torch.Tensor]:
        save(content, tmp_path / "mine.pth")
        fill(network.backbone, read_state_dict(tmp_path / "mine.pth"), "mine.pth")
        return network.backbone.state_dict()

    return read


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (dict, ""),
        (lambda s: {"state_dict": s, "epoch": 3}, "what is in 'state_dict'"),
        (lambda s: {"model": prefixed(s, "module.")}, "without the prefix 'module.'"),
        (lambda s: prefixed(s, "model."), "without the prefix 'model.'"),
        (lambda s: prefixed(s, "_orig_mod.module."), "'_orig_mod.', without the prefix 'module.'"),
        (lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()}, ""),
    ],
)
def test_a_state_dict_is_taken_in_the_usual_wrappings(read, features, capsys, wrap, said):
    got = read(wrap(features))
    assert all(torch.equal(tensor, features[key]) for key, tensor in got.items())
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(read, features, capsys, dtype):
    halves = {k: v.to(dtype) if v.is_floating_point() else v for k, v in features.items()}
    got = read(halves)
    for key, tensor in got.items():
        assert torch.equal(tensor, halves[key].to(tensor.dtype))
    assert "half precision as float32" in capsys.readouterr().out


KEY = "features.4.block.3.0.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s | {KEY: torch.zeros(3)}, f"mine.pth: {KEY} is .*must be .*40, 96"),
        (lambda s: {k: v for k, v in s.items() if k != KEY}, f"mine.pth: has no {KEY}"),
        (lambda s: s | {KEY: torch.full((40, 96, 1, 1), float("nan"))}, f"{KEY} .* not finite"),
        (lambda s: s | {KEY: torch.full((40, 96, 1, 1), float("inf"))}, f"{KEY} .* not finite"),
        (lambda s: s | {KEY: s[KEY].to_sparse()}, f"{KEY} is not a plain tensor"),
        (lambda s: s | {KEY: s[KEY].to("meta")}, f"{KEY} is not a plain tensor"),
        (lambda s: s | {0: torch.zeros(3)}, "must be a state dict.* 0 is a Tensor"),
        (lambda s: s | {"epoch": 3}, "'epoch' is a int"),
        (lambda s: list(s.values()), "must be a state dict"),
        (lambda s: {}, "must be a state dict"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(read, features, change, words):

    message = refusal(lambda: read(change(features)))
    assert re.search(words, message), message


def test_quantized_tensors_and_pickled_models_are_refused_without_bad_advice(read, features):
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    for content in (features | {KEY: quantized}, nn.Linear(2, 2), {"state_dict": nn.Linear(2, 2)}):
        message = refusal(lambda content=content: read(content))
        assert "mine.pth" in message
        assert "weights_only" not in message
    assert "save model.state_dict()" in message


def test_half_a_safetensors_file_is_named(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(9)}, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[:-5])
    assert "w.safetensors: cannot be read" in refusal(
        lambda: read_state_dict(tmp_path / "w.safetensors")
    )


class TestOfficial:
    def test_other_features_than_the_official_ones_are_refused(
        self, tmp_path, features, monkeypatch
    ):
        monkeypatch.setenv("ASSETS_DIR", str(tmp_path))
        path = tmp_path / "mobilenet_v3_small-IMAGENET1K_V1-features.pth"
        get = functools.partial(pretrained, "mobilenet_v3_small", "IMAGENET1K_V1")
        assert f"{path}: cannot be read as a state dict: No such file" in refusal(get)
        torch.save(features, path)
        assert f"{path}: is not the features" in refusal(get)
        path.write_bytes(path.read_bytes()[:1000])
        assert f"{path}: " in refusal(get)

    def test_an_official_file_is_held_to_the_checksum_in_its_name(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ASSETS_DIR", str(tmp_path))
        path = tmp_path / "resnet18-f37072fd.pth"
        get = functools.partial(pretrained, "resnet18", "IMAGENET1K_V1")
        assert f"{path}: is missing" in refusal(get)
        torch.save(torchvision.models.resnet18().state_dict(), path)
        message = refusal(get)
        assert f"{path}: is damaged" in message
        assert "f37072fd" in message

    def test_an_unknown_name_is_refused_with_what_there_is(self):
        message = refusal(lambda: pretrained("mobilenet_v3_small", "best"))
        assert "model.weights = 'best'" in message
        assert "IMAGENET1K_V1" in message


def test_dvc_notices_when_own_weights_change_or_are_gone(project, features):
    path = project / "weights/mine.pth"
    torch.save(features, path)
    set_params(project, {"model": {"weights": "weights/mine.pth"}})
    dvc(project, "repro", "backbone")
    assert "up to date" in dvc(project, "status", "backbone")
    torch.save({key: value + 1 for key, value in features.items()}, path)
    assert "weights" in dvc(project, "status", "backbone")
    path.unlink()
    output = dvc(project, "repro", "backbone", fails=True)
    assert "error: model.weights = 'weights/mine.pth': neither a file in weights/" in output


def test_own_weights_elsewhere_are_refused_as_dvc_would_not_notice_a_change(
    tmp_path, features, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for name in ("mine.pth", "weights/../mine.pth", str(tmp_path / "mine.pth")):
        torch.save(features, name)
        message = refusal(lambda name=name: pretrained("mobilenet_v3_small", name))
        assert "move it there and take weights/mine.pth" in message
