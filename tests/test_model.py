import pytest
import torch
from helpers import ROOT, refusal
from torch import nn

from transfer.architecture import describe
from transfer.common.dataset import Split
from transfer.common.settings import MODES, load_params
from transfer.inference import choose_device, to_input
from transfer.model import (
    ConvolutionWithNorm,
    classifier,
    cut,
    feature_blocks,
    folded,
    freeze,
)
from transfer.model import build, fill, parameter_count, trace
from transfer.training.loop import train


@pytest.fixture
def mobilenet():
    return load_params(str(ROOT / "params.yaml")).model


def with_weights(name: str) -> nn.Module:
    """A classifier whose weights and BatchNorm statistics are all drawn at random."""
    torch.manual_seed(0)
    original = classifier(name)
    for tensor in original.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 0.3)
    return original.eval()


def test_five_blocks_of_mobilenet_are_torchvisions_own(mobilenet):
    original = with_weights("mobilenet_v3_small")
    network = build(mobilenet, 10)
    fill(network.backbone, original.state_dict(), "test")
    images = torch.randn(2, 3, 96, 96)
    got = network.backbone.eval()(images)
    assert got.shape == (2, 40, 6, 6)  # stride 16
    assert torch.equal(got, original.features[:5](images))
    assert parameter_count(network.backbone) == 24_224
    assert parameter_count(network.head) <= 500_000
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {mobilenet.batch_norm_momentum}


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "vgg11_bn", "regnet_y_400mf", "shufflenet_v2_x1_0"]
)
def test_all_blocks_are_the_whole_feature_extractor(name):
    original = with_weights(name)
    blocks = cut(with_weights(name), None).eval()
    images = torch.randn(1, 3, 64, 64)
    seen = []
    # The classifier's first linear layer takes the pooled, flattened feature map.
    first = next(m for m in original.modules() if isinstance(m, nn.Linear) and m.in_features > 400)
    first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    original(images)
    pooled = nn.functional.adaptive_avg_pool2d(blocks(images), 7 if name == "vgg11_bn" else 1)
    torch.testing.assert_close(pooled.flatten(1), seen[0])


@pytest.mark.parametrize(
    ("name", "left"), [("mobilenet_v3_small", 0), ("resnet18", 0), ("densenet121", 62)]
)
def test_a_folded_backbone_computes_the_same(name, left):
    backbone = cut(with_weights(name), None)
    freeze(backbone)
    images = torch.randn(2, 3, 64, 64)
    wanted = backbone(images)
    faster = folded(backbone, images[:1])
    assert faster is not backbone
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    inside = sum(isinstance(module, ConvolutionWithNorm) for module in faster.modules())
    assert norms - inside == left
    assert {id(p) for p in faster.parameters()} == {id(p) for p in backbone.parameters()}
    torch.testing.assert_close(faster(images), wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(backbone(images), wanted)


class Unusual(nn.Module):
    """Has no graph that does not depend on what passes through it."""

    def forward(self, x):
        return x * 2 if x.mean() > 0 else x


def test_a_backbone_that_cannot_be_folded_stays_as_it_is():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Unusual())
    freeze(backbone)
    assert folded(backbone, torch.randn(1, 3, 8, 8)) is backbone
    overflowing = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    freeze(overflowing)
    overflowing[1].weight.data.fill_(float("inf"))
    assert folded(overflowing, torch.randn(1, 3, 8, 8)) is overflowing


def test_the_worked_example_trains_1026_parameters(mobilenet):
    settings = mobilenet.model_copy(update={"name": "resnet18", "blocks": None, "head": "linear"})
    network = build(settings, 2)
    freeze(network.backbone)
    assert parameter_count(network, trainable=True) == 512 * 2 + 2
    assert isinstance(network.head[-1], nn.Linear)
    assert network.head[-1].out_features == 2


CLASSIFIERS = [
    "mobilenet_v3_small", "mobilenet_v3_large", "mobilenet_v2", "resnet18", "resnet50",
    "efficientnet_b0", "vgg11_bn", "densenet121", "convnext_tiny", "regnet_y_400mf",
    "shufflenet_v2_x1_0", "squeezenet1_1",
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_any_classifier_takes_a_step(params, name, mode):
    params = params.changed(
        {
            "model": {"name": name, "blocks": None, "head": "linear"},
            "train": {
                "shared": {"batch_size": 4},
                "frozen": {"epochs": 1},
                "finetuned": {"epochs": 1, "initial_scale": 1.0},
            },
        }
    )
    four = Split(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8), torch.arange(4))
    network = build(params.model, 10)
    for module in network.backbone.modules():  # so that random weights pass something on
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    many = torch.randint(0, 256, (32, 32, 32, 3), dtype=torch.uint8)
    network.train()(to_input(many, 32))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    train(network, mode, four, four, params, choose_device("cpu", 1), lambda *_: None)
    moved = {
        key.partition(".")[0]
        for key, value in network.state_dict().items()
        if not torch.equal(value, before[key])
    }
    assert moved == ({"head"} if mode == "frozen" else {"backbone", "head"})


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "squeezenet1_1"])
def test_a_classifier_can_be_cut_after_any_block(name):
    names = list(feature_blocks(classifier(name)))
    whole = cut(with_weights(name), None).eval()
    image = torch.randn(1, 3, 64, 64)
    outputs = {}
    for block in names:
        whole.get_submodule(block).register_forward_hook(
            lambda _, __, output, block=block: outputs.update({block: output.clone()})
        )
    whole(image)
    for count, block in enumerate(names, 1):
        assert torch.equal(cut(with_weights(name), count).eval()(image), outputs[block])


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"name": "mobilenet_v4"}, ["model.name = 'mobilenet_v4'", "mobilenet_v3_small"]),
        ({"blocks": 14}, ["model.blocks = 14", "13", "features.12"]),
        ({"name": "vgg11", "blocks": None, "image_size": 16}, ["model.image_size = 16"]),
    ],
)
def test_an_impossible_model_is_refused(mobilenet, update, words):
    message = refusal(lambda: build(mobilenet.model_copy(update=update), 10))
    assert all(word in message for word in words)


def test_multiply_accumulates_are_counted_as_by_hand():
    blocks = {"conv": nn.Conv2d(3, 8, 3, 2, 1), "flat": nn.Flatten(), "last": nn.Linear(8 * 64, 5)}
    traced = trace(blocks, 16)
    assert [b.macs for b in traced.values()] == [3 * 8 * 9 * 8 * 8, 0, 8 * 64 * 5]
    assert [b.shape for b in traced.values()] == [(8, 8, 8), (512,), (5,)]


def test_the_description_tells_what_is_kept_cut_and_replaced(mobilenet):
    text = describe(mobilenet, 10)
    lines = {tuple(line.split()[:2]): line for line in text.splitlines() if line.strip()}
    assert "classifier.3 = Linear(in_features=1024, out_features=1000" in text
    assert "40 x" in lines["kept", "features.4"]
    assert "13,736" in lines["kept", "features.4"]
    assert ("cut", "features.5") in lines
    assert "avgpool, classifier: by the head" in text
    assert "24,224  fixed" in text
    assert "12 of its 12 BatchNorm layers" in text
