"""Pretrained weights: the official ones are checked, your own are taken as people have them."""

import hashlib
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from dvc.repo import Repo
from helpers import ROOT, dvc, go_offline, refusal, set_params, with_settings
from torch import nn
from torchvision.models import get_model_weights

from stages import network
from transfer.model import IMAGENET, Network, classifier
from transfer.settings import load_params

SETTINGS = load_params(str(ROOT / "params.yaml"))
KEY = "features.4.block.3.0.weight"
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
FEATURES = {"mean": (0.48235, 0.45882, 0.40784), "std": (0.00392156862745098,) * 3}


def remade(state, prefix="", convert=torch.Tensor.float):
    return {prefix + k: convert(v) if v.is_floating_point() else v for k, v in state.items()}


@pytest.fixture(scope="module")
def features() -> dict[str, torch.Tensor]:
    """A state dict with values that any precision can hold."""
    state = classifier("mobilenet_v3_small").features.state_dict(prefix="features.")
    return remade(state, convert=torch.sign)


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    return Network(SETTINGS.model, ["cat", "dog"]).backbone.body


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with a folder weights/; torch's cache is in torch/."""
    monkeypatch.chdir(tmp_path)
    go_offline(monkeypatch, tmp_path / "torch")
    Path("weights").mkdir()
    return tmp_path


def read(weights: str, name: str = "mobilenet_v3_small"):
    settings = with_settings(SETTINGS, {"model.name": name, "model.weights": weights}).model
    with torch.device("meta"):
        return network.read_weights(settings, classifier(name))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": remade(s, "module.")},
        lambda s: remade(s, "model."),
        lambda s: remade(s, "_orig_mod.module."),
        lambda s: remade(s, convert=nn.Parameter),
        lambda s: remade(s, convert=torch.Tensor.half),
        lambda s: remade(s, convert=torch.Tensor.bfloat16),
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},  # an old one
    ],
)
@pytest.mark.usefixtures("here")
def test_a_state_dict_is_taken_as_people_have_it(backbone, features, wrap):
    torch.save(wrap(features), "weights/mine.pth")
    network.fill(backbone, read("weights/mine.pth")[0], "")
    for key, tensor in backbone.state_dict().items():
        assert tensor.dtype == features[key].dtype
        assert torch.equal(tensor, features[key])


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s | {KEY: torch.zeros(3)}, rf"{KEY} is .*not of shape \(40, 96, 1, 1\)"),
        (lambda s: s | {KEY: s[KEY].log()}, f"{KEY} is not finite"),
        (lambda s: {k: v for k, v in s.items() if k != KEY}, f"has no {KEY}; take"),
        (lambda s: s | {"epoch": 3}, "is damaged or no state dict"),
        (lambda s: list(s.values()), "is damaged or no state dict"),
        (lambda s: {"state_dict": Harmful()}, "is damaged or no state dict"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_does_not_fit_is_refused_by_name_and_no_code_runs(backbone, features, change, words):
    torch.save(change(features), "weights/mine.pth")
    mine = str(Path("weights/mine.pth"))
    message = refusal(lambda: network.fill(backbone, read(mine)[0], mine))
    assert re.match(f"{re.escape(mine)}: {words}", message), message
    assert not Path("ran").exists()


@pytest.mark.usefixtures("here")
def test_own_weights_are_whole_files_where_dvc_watches_them(features):
    content = safetensors.torch.save(features)
    for path in ("weights/mine.safetensors", "weights/cut.safetensors", "outside.safetensors"):
        Path(path).write_bytes(content[:-5] if "cut" in path else content)
    assert torch.equal(read("weights/mine.safetensors")[0][KEY], features[KEY])
    assert re.match(
        r"weights.cut\.s.*: is damaged", refusal(lambda: read("weights/cut.safetensors"))
    )
    for path in ("outside.safetensors", "weights/../outside.safetensors", "weights/none", "V1"):
        message = refusal(lambda path=path: read(path))
        assert message.startswith(f"model.weights = {Path(path)}: must be a file in weights/, ")


def test_official_weights_are_held_to_their_checksums(here, features, monkeypatch):
    monkeypatch.setenv("ASSETS_DIR", str(here))
    whole = here / "mobilenet_v3_small-047dcff4.pth"
    part = here / "mobilenet_v3_small-IMAGENET1K_V1-features.pth"
    assert re.search(f"No such file .*{whole.name}", refusal(lambda: read("IMAGENET1K_V1")))
    torch.save(features, part)
    message = f"{part}: is damaged: its sha256 does not start with {network.FEATURES_SHA256}"
    assert refusal(lambda: read("IMAGENET1K_V1")) == message
    sha256 = hashlib.sha256(part.read_bytes()).hexdigest()
    monkeypatch.setattr(network, "FEATURES_SHA256", sha256)
    assert torch.equal(read("IMAGENET1K_V1")[0][KEY], features[KEY])
    torch.save(features, whole)
    message = f"{whole}: is damaged: its sha256 does not start with 047dcff4"
    assert refusal(lambda: read("IMAGENET1K_V1")) == message


@pytest.mark.usefixtures("here")
def test_official_weights_that_cannot_be_downloaded_are_named_in_one_line():
    words = "https://.*mobilenet_v3_small-047dcff4.pth: .+; .*ASSETS_DIR.* make demo"
    assert re.match(words, refusal(lambda: read("IMAGENET1K_V1")))


@pytest.mark.filterwarnings("ignore:The default weight init")
@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("resnet18", "IMAGENET1K_V1", IMAGENET),
        ("inception_v3", "IMAGENET1K_V1", HALF),
        ("googlenet", "IMAGENET1K_V1", HALF),
        ("vgg16", "IMAGENET1K_FEATURES", FEATURES),
    ],
)
def test_official_weights_bring_their_normalisation(here, monkeypatch, name, weights, expected):
    """A generated checkpoint in ASSETS_DIR, named after its own checksum, stands for each."""
    monkeypatch.setenv("ASSETS_DIR", str(here))
    torch.save({"a": torch.ones(9)}, "made")
    made = f"made-{hashlib.sha256(Path('made').read_bytes()).hexdigest()[:8]}.pth"
    Path("made").rename(made)
    monkeypatch.setattr(get_model_weights(name)[weights].value, "url", f"https://a/{made}")
    state, normalisation = read(weights, name)
    assert normalisation == expected
    assert torch.equal(state["a"], torch.ones(9))


def test_dvc_notices_when_own_weights_change(project, features, monkeypatch):
    monkeypatch.chdir(project)
    set_params(project, {"model.weights": "weights/mine.pth"})
    torch.save(features, "weights/mine.pth")
    dvc(project, "repro", "network")
    made = safetensors.torch.load_file("models/new.safetensors")
    assert torch.equal(made[f"backbone.body.{KEY}"], features[KEY])
    assert torch.equal(made["std"], torch.tensor(IMAGENET["std"]))
    assert Repo().status(["network"]) == {}
    torch.save(remade(features, convert=torch.neg), "weights/mine.pth")
    assert "'weights': 'modified'" in str(Repo().status(["network"]))
