"""Pretrained weights: the official ones are checked, your own are taken as people have them."""

import re

import pytest
import safetensors.torch
import torch
from helpers import ROOT, dvc, refusal, set_params
from torch import nn

from transfer.common.settings import load_params
from transfer.model import build, classifier, fill
from transfer.pretrained import FEATURES_DIGEST, content_digest, pretrained, read_state_dict

OFFICIAL = ("mobilenet_v3_small", "IMAGENET1K_V1")
KEY = "features.4.block.3.0.weight"


def remade(state, prefix="", convert=torch.Tensor.float):
    return {prefix + k: convert(v) if v.is_floating_point() else v for k, v in state.items()}


@pytest.fixture(scope="module")
def features():
    """With values that any precision can hold."""
    state = remade(classifier(OFFICIAL[0]).state_dict(), convert=lambda v: v.bfloat16().half())
    return remade({key: value for key, value in state.items() if key.startswith("features.")})


def read(folder, content) -> dict[str, torch.Tensor]:
    """What the backbone gets from an object that is saved as a file."""
    backbone = build(load_params(str(ROOT / "params.yaml")).model, 10).backbone
    torch.save(content, folder / "mine.pth")
    fill(backbone, read_state_dict(folder / "mine.pth"), "mine.pth")
    return backbone.state_dict()


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: {"state_dict": s, "epoch": 3}, "what is in 'state_dict'"),
        (lambda s: {"model": remade(s, "module.")}, "what is in 'model', .* prefix 'module.'"),
        (lambda s: remade(s, "model."), "without the prefix 'model.'"),
        (lambda s: remade(s, "_orig_mod.module."), "without the prefix '_orig_mod.module.'"),
        (lambda s: remade(s, convert=nn.Parameter), ""),
        (lambda s: remade(s, convert=torch.Tensor.half), ""),
        (lambda s: remade(s, convert=torch.Tensor.bfloat16), ""),
        (lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, ""),  # an old one
    ],
)
def test_a_state_dict_is_taken_as_people_have_it(tmp_path, features, capsys, wrap, said):
    for key, tensor in read(tmp_path, wrap(features)).items():
        assert tensor.dtype == features[key].dtype
        assert torch.equal(tensor, features[key])
    printed = rf".*mine\.pth: read {said}\n" if said else ""
    assert re.fullmatch(printed, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s | {KEY: torch.zeros(3)}, f"mine.pth: {KEY} is .*must be .*40, 96"),
        (lambda s: {k: v for k, v in s.items() if k != KEY}, f"mine.pth: has no {KEY}"),
        (lambda s: s | {KEY: s[KEY].log()}, f"{KEY} .* not finite"),
        (lambda s: s | {KEY: s[KEY].to_sparse()}, f"{KEY} is not a plain tensor"),
        (lambda s: s | {KEY: s[KEY].to("meta")}, f"{KEY} is not a plain tensor"),
        (lambda s: s | {0: torch.zeros(3)}, "must be a state dict.* 0 is a Tensor"),
        (lambda s: s | {"epoch": 3}, "'epoch' is a int"),
        (lambda s: list(s.values()), "must be a state dict"),
        (lambda s: {}, "must be a state dict"),
        (lambda s: {"state_dict": nn.Linear(2, 2)}, "mine.pth: .* which could run code"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, features, change, words):
    message = refusal(lambda: read(tmp_path, change(features)))
    assert re.search(words, message), message
    assert "weights_only" not in message  # bad advice


def test_official_weights_are_held_to_their_checksums(tmp_path, features, monkeypatch):
    monkeypatch.setenv("ASSETS_DIR", str(tmp_path))
    part = tmp_path / "mobilenet_v3_small-IMAGENET1K_V1-features.pth"
    torch.save(features, part)
    message = refusal(lambda: pretrained(*OFFICIAL))
    assert message == f"{part}: is not the features of torchvision's IMAGENET1K_V1"
    monkeypatch.setitem(FEATURES_DIGEST, OFFICIAL, content_digest(features))
    assert pretrained(*OFFICIAL).keys() == features.keys()
    whole = tmp_path / "mobilenet_v3_small-047dcff4.pth"
    torch.save(classifier(OFFICIAL[0]).state_dict(), whole)
    message = refusal(lambda: pretrained(*OFFICIAL))
    assert re.match(rf"{whole}: is damaged or altered: .* 047dcff4$", message)


def test_own_weights_must_be_whole_and_where_dvc_watches_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = safetensors.torch.save({"a": torch.ones(9)})
    (tmp_path / "a.safetensors").write_bytes(content)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/cut.safetensors").write_bytes(content[:-5])
    for name, words in (
        ("weights/../a.safetensors", "must be in the .* take weights/a.safetensors$"),
        ("weights/cut.safetensors", "weights/cut.safetensors: cannot be read"),
        ("best", "model.weights = 'best': does not exist; .* one of IMAGENET1K_V1"),
    ):
        message = refusal(lambda name=name: pretrained(OFFICIAL[0], name))
        assert re.search(words, message), message


def test_dvc_notices_when_own_weights_change(project, features):
    set_params(project, {"model": {"weights": "weights/mine.pth"}})
    torch.save(features, project / "weights/mine.pth")
    dvc(project, "repro", "network")
    assert "up to date" in dvc(project, "status", "network")
    torch.save(remade(features, convert=torch.neg), project / "weights/mine.pth")
    assert "weights" in dvc(project, "status", "network")
