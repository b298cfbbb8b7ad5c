"""The network: what torchvision's classifiers compute is kept, cut, folded, trained and shown."""

import copy
import re

import pytest
import torch
from helpers import ROOT, refusal, with_settings
from torch import nn

from stages.network import describe, fill
from stages.train import train
from transfer import model
from transfer.data import Split, to_input
from transfer.model import Backbone, Network, block_names, classifier, parameter_count
from transfer.settings import load_params

SETTINGS = load_params(str(ROOT / "params.yaml")).model
CLASSES = list("abcdefghij")
CLASSIFIERS = [
    "mobilenet_v3_small", "mobilenet_v3_large", "mobilenet_v2", "resnet18", "resnet50",
    "efficientnet_b0", "vgg11_bn", "densenet121", "convnext_tiny", "regnet_y_400mf",
    "shufflenet_v2_x1_0", "squeezenet1_1",
]  # fmt: skip
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
ROWS = (
    r"kept +features.4 +InvertedResidual +40 x 8 x 8 +13,736 +993,792 +fixed +trained",
    r"cut +features.5 +InvertedResidual +40 x 8 x 8 +57,264 +1,643,520\n",
    r"new +head.3 +Linear +10 +2,570 +2,560 +trained +trained",
    "mean .0.485, 0.456, 0.406.", "trains 344,330 of 368,554 parameters",
    "classifier.3 = Linear.in_features=1024, out_features=1000",
)  # fmt: skip


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


def with_weights(name: str) -> nn.Module:
    """A classifier with random weights that pass something on, and with BatchNorm's statistics."""
    torch.manual_seed(0)
    original = classifier(name)
    for norm in norms(original):
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    original.train()(IMAGES)
    return original.eval()


def test_the_default_network_is_five_blocks_of_torchvisions_and_a_small_head():
    original, network = with_weights("mobilenet_v3_small"), Network(SETTINGS, CLASSES)
    fill(network.backbone.body, original.state_dict(), "test")
    assert torch.equal(network.backbone.eval()(IMAGES), original.features[:5](IMAGES))
    assert network.backbone(IMAGES).shape == (2, 40, 4, 4)  # stride 16
    assert parameter_count(network.backbone) == 24_224
    assert {norm.momentum for norm in norms(network)} == {SETTINGS.batch_norm_momentum}


@pytest.mark.filterwarnings("ignore:The default weight init", "ignore:NOTE")
@pytest.mark.parametrize("name", [*CLASSIFIERS, "googlenet", "swin_t"])
def test_after_a_block_comes_what_torchvision_has_there(name):
    original, outputs = with_weights(name), {}
    names = block_names(original)
    hooked = copy.deepcopy(original)
    for key, part in hooked.named_modules():
        if key in names:
            part.register_forward_hook(lambda _, x, y, key=key: outputs.update({key: y + 0}))
    hooked(IMAGES)
    if name == "densenet121":  # its last block is a function in torchvision
        outputs["relu"] = outputs[names[-2]].relu()
    for count in (1, len(names) // 2, None):
        wanted = outputs[names[(count or 0) - 1]]
        assert torch.equal(Backbone(original, count).eval()(IMAGES), wanted)


@pytest.mark.parametrize(
    ("name", "left"), [("mobilenet_v3_small", 0), ("efficientnet_b0", 0), ("densenet121", 62)]
)
def test_a_folded_backbone_computes_the_same(name, left):
    backbone = Backbone(with_weights(name), None)
    model.freeze(backbone)
    wanted = backbone(IMAGES)
    faster = model.folded(backbone, IMAGES[:1])
    inside = sum(isinstance(module, model.FoldedConvolution) for module in faster.modules())
    assert len(norms(backbone)) - inside == left
    assert {id(p) for p in faster.parameters()} == {id(p) for p in backbone.parameters()}
    torch.testing.assert_close(faster(IMAGES), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(backbone(IMAGES), wanted)
    faster.train()  # which may drop blocks at random, as before
    assert torch.equal(faster(IMAGES), faster(IMAGES)) == (name != "efficientnet_b0")


class Backwards(nn.Sequential):
    def forward(self, x):
        return self[0](self[1](x))


@pytest.mark.parametrize(("kind", "weight"), [(Backwards, 2.0), (nn.Sequential, float("inf"))])
def test_a_backbone_that_cannot_be_folded_stays_as_it_is(kind, weight):
    backbone = kind(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    nn.init.constant_(backbone[1].weight, weight)
    assert model.folded(backbone, IMAGES) is backbone


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_any_classifier_takes_a_step_in_both_modes(params, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {
        "model.name": name, "model.blocks": None, "model.head": "linear",
        "model.batch_norm_momentum": 1.0, "train.shared.batch_size": 4,
        "train.frozen.epochs": 1, "train.finetuned.epochs": 1,
    }  # fmt: skip
    settings = with_settings(params, changes)
    network = Network(settings.model, CLASSES)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    network.train()(to_input(images, 32, network.mean, network.std))  # fills BatchNorm's statistics
    data, index = Split(images, torch.arange(8)), torch.arange(4)
    for mode, moves in (("frozen", {"head"}), ("finetuned", {"backbone", "head"})):
        before = {key: value.clone() for key, value in network.state_dict().items()}
        train(mode, network, data, index, index, settings)
        after = network.state_dict()
        moved = {key.split(".")[0] for key in before if not torch.equal(after[key], before[key])}
        assert moved == moves


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "mobilenet_v4"}, "model.name = mobilenet_v4: torch.*, mobilenet_v3_small,"),
        ({"blocks": 14}, r"model.blocks = 14: MobileNetV3 has 13 blocks: .*, features\.12$"),
        ({"name": "squeezenet1_1", "blocks": None, "image_size": 16}, "model.image_size = 16: .*"),
        ({"name": "swin_t", "blocks": 2}, r"model.blocks: .* no feature map \(N, C, h, w\)"),
        ({"name": "swin_t", "blocks": None}, r"model.blocks: .* no feature map \(N, C, h, w\)"),
        ({"name": "vit_b_32", "blocks": 2}, "model.image_size = 128: .* a convolutional network"),
    ],
)
def test_an_impossible_model_is_refused(changes, words):
    settings = SETTINGS.model_copy(update=changes)
    assert re.match(words, refusal(lambda: Network(settings, CLASSES)))


def test_a_saved_network_is_loaded_as_it_was(tmp_path):
    own = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    network = Network(SETTINGS.model_copy(update={"head": "linear"}), ["é", "b"], own)
    network.temperature.fill_(1.5)
    network.pixels = 77
    path = tmp_path / "models/network.safetensors"
    assert refusal(lambda: model.load(path)) == f"{path}: is missing; run dvc repro"
    path.parent.mkdir()
    path.write_bytes(b"no model")
    assert refusal(lambda: model.load(path)) == f"{path}: is not a complete model of this project"
    model.save(network, path)
    loaded = model.load(path)
    for name in ("settings", "classes", "pixels"):
        assert getattr(loaded, name) == getattr(network, name)
    before, after = network.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.equal(after["std"], torch.tensor([0.2, 0.3, 0.4]))


def test_the_description_tells_what_is_kept_cut_and_new():
    text = describe(Network(SETTINGS, CLASSES), classifier("mobilenet_v3_small"))
    assert [words for words in ROWS if not re.search(words, text)] == []
    assert [text.count(f"\n{part} ") for part in ("kept", "cut", "new")] == [5, 8, 4]
