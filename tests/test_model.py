"""The network: what torchvision's classifiers compute is kept, cut, folded, trained and shown."""

import re

import pytest
import torch
from helpers import ROOT, refusal
from torch import nn
from torchvision.ops import StochasticDepth

from transfer import model
from transfer.architecture import describe
from transfer.common.dataset import Split
from transfer.common.settings import MODES, load_params
from transfer.inference import set_up_torch, to_input
from transfer.model import build, classifier, cut, fill, folded, freeze, parameter_count
from transfer.training.loop import train
from transfer.training.modes import make_mode

SETTINGS = load_params(str(ROOT / "params.yaml")).model
CLASSIFIERS = [
    "mobilenet_v3_small", "mobilenet_v3_large", "mobilenet_v2", "resnet18", "resnet50",
    "efficientnet_b0", "vgg11_bn", "densenet121", "convnext_tiny", "regnet_y_400mf",
    "shufflenet_v2_x1_0", "squeezenet1_1",
]  # fmt: skip
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def with_weights(name: str) -> nn.Module:
    """A classifier with random weights that pass something on, and with BatchNorm's statistics."""
    torch.manual_seed(0)
    original = classifier(name)
    for norm in (module for module in original.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    original.train()(IMAGES)
    return original.eval()


def test_the_default_network_is_five_blocks_of_torchvisions_and_a_small_head():
    original = with_weights("mobilenet_v3_small")
    network = build(SETTINGS, 10)
    fill(network.backbone, original.state_dict(), "test")
    got = network.backbone.eval()(IMAGES)
    assert got.shape == (2, 40, 4, 4)  # stride 16
    assert torch.equal(got, original.features[:5](IMAGES))
    assert parameter_count(network.backbone) == 24_224
    assert parameter_count(network.head) <= 500_000
    assert network.backbone.features[0][1].momentum == SETTINGS.batch_norm_momentum


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_after_any_block_comes_what_torchvision_has_there(name):
    original, inputs = with_weights(name), []
    blocks = [b for b in model.feature_blocks(original).values() if b in set(original.modules())]
    after = [child for key, child in original.named_children() if key in model.AFTER_FEATURES]
    for module in [*blocks, *after]:
        module.register_forward_pre_hook(lambda _, x: inputs.append(x[0].clone()))
    original(IMAGES)
    inside = inputs[: len(blocks) + 1]
    for count in range(1, len(blocks)):
        assert torch.equal(cut(original, count)(IMAGES), inside[count])
    whole = cut(original, None)(IMAGES)
    pooled = inside[-1].ndim == 2  # by a function, not a module
    torch.testing.assert_close(whole.mean((2, 3)) if pooled else whole, inside[-1])


@pytest.mark.parametrize(
    ("name", "left"), [("mobilenet_v3_small", 0), ("efficientnet_b0", 0), ("densenet121", 62)]
)
def test_a_folded_backbone_computes_the_same(name, left):
    backbone = cut(with_weights(name), None)
    freeze(backbone)
    wanted = backbone(IMAGES)
    faster = folded(backbone, IMAGES[:1])
    assert faster is not backbone
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    inside = sum(isinstance(module, model.ConvolutionWithNorm) for module in faster.modules())
    assert norms - inside == left
    both = (backbone.modules(), faster.modules())
    drops = [any(isinstance(module, StochasticDepth) for module in modules) for modules in both]
    assert drops == [name == "efficientnet_b0"] * 2  # in training, blocks are dropped at random
    assert {id(p) for p in faster.parameters()} == {id(p) for p in backbone.parameters()}
    torch.testing.assert_close(faster(IMAGES), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(backbone(IMAGES), wanted)


class Backwards(nn.Sequential):
    def forward(self, x):
        return self[0](self[1](x))


@pytest.mark.parametrize(("kind", "weight"), [(Backwards, 2.0), (nn.Sequential, float("inf"))])
def test_a_backbone_that_cannot_be_folded_stays_as_it_is(kind, weight):
    backbone = kind(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    nn.init.constant_(backbone[1].weight, weight)
    assert folded(backbone, IMAGES) is backbone


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_any_classifier_takes_a_step(params, name, mode):
    network_settings = {"name": name, "blocks": None, "head": "linear", "batch_norm_momentum": 1.0}
    step = {"shared": {"batch_size": 4}, mode: {"epochs": 1}}
    changed = params.changed({"model": network_settings, "train": step})
    network = build(changed.model, 10)
    images = torch.randint(0, 256, (32, 32, 32, 3), dtype=torch.uint8)
    network.train()(to_input(images, 32, network.mean, network.std))  # fills BatchNorm's statistics
    before = {key: value.clone() for key, value in network.state_dict().items()}
    four = Split(images[:4], torch.arange(4))
    train(make_mode(mode, network, four, changed, set_up_torch("cpu", 1)), four)
    after = network.state_dict()
    moved = {key.split(".")[0] for key in before if not torch.equal(after[key], before[key])}
    assert moved == ({"head"} if mode == "frozen" else {"backbone", "head"})


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"name": "mobilenet_v4"}, r"model\.name = 'mobilenet_v4': .*, mobilenet_v3_small,"),
        ({"blocks": 14}, r"model\.blocks = 14: \w+ has 13: .*, features\.12$"),
        ({"name": "vgg11", "blocks": None, "image_size": 16}, r"model\.image_size = 16: .* no fea"),
    ],
)
def test_an_impossible_model_is_refused(update, words):
    assert re.match(words, refusal(lambda: build(SETTINGS.model_copy(update=update), 10)))


def test_multiply_accumulates_are_counted_as_by_hand():
    blocks = {"conv": nn.Conv2d(3, 8, 3, 2, 1), "flat": nn.Flatten(), "last": nn.Linear(8 * 64, 5)}
    seen = model.measure_blocks(blocks, 16).values()
    assert [block.macs for block in seen] == [3 * 8 * 9 * 8 * 8, 0, 8 * 64 * 5]
    assert [block.shape for block in seen] == [(8, 8, 8), (512,), (5,)]


def test_the_description_tells_what_is_kept_cut_and_replaced():
    text = describe(SETTINGS, 10)
    for words in (
        r"classifier\.3 = Linear\(in_features=1024, out_features=1000",
        r"kept +features\.4 .* 40 x 8 x 8 +13,736 ", r"cut +features\.5 ",
        "avgpool, classifier: by the head", "24,224  fixed", "12 of its 12 BatchNorm layers",
    ):  # fmt: skip
        assert re.search(words, text)
