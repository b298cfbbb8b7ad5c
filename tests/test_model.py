import pytest
import torch
import torchvision
from conftest import ROOT
from torch import nn

from transfer import data, description, model, params, training
from transfer.errors import InputError


@pytest.fixture
def mobilenet():
    return params.load(str(ROOT / "params.yaml")).model


def with_weights(name: str, seed: int = 0) -> nn.Module:
    """A classifier whose weights and BatchNorm statistics are all drawn at random."""
    torch.manual_seed(seed)
    original = model.classifier(name)
    for tensor in original.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 0.3)
    return original.eval()


def test_five_blocks_of_mobilenet_are_torchvisions_own(mobilenet):
    original = with_weights("mobilenet_v3_small")
    network = model.build(mobilenet, 10)
    model.fill(network.backbone, original.state_dict(), "test")
    pictures = torch.randn(2, 3, 96, 96)
    got = network.backbone.eval()(pictures)
    assert got.shape == (2, 40, 6, 6)  # stride 16
    assert torch.equal(got, original.features[:5](pictures))
    assert model.parameters(network.backbone) == 24_224
    assert model.parameters(network.head) <= 500_000
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}  # torchvision's 0.01 lags behind


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "vgg11_bn", "regnet_y_400mf", "shufflenet_v2_x1_0"]
)
def test_all_blocks_are_the_whole_feature_extractor(name):
    original = with_weights(name)
    blocks = model.cut(with_weights(name), None).eval()
    pictures = torch.randn(1, 3, 64, 64)
    seen = []
    # The classifier's first linear layer takes the pooled, flattened feature map.
    first = next(m for m in original.modules() if isinstance(m, nn.Linear) and m.in_features > 400)
    first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    original(pictures)
    pooled = nn.functional.adaptive_avg_pool2d(blocks(pictures), 7 if name == "vgg11_bn" else 1)
    torch.testing.assert_close(pooled.flatten(1), seen[0])


def test_the_worked_example_learns_1026_parameters(mobilenet):
    settings = mobilenet.model_copy(update={"name": "resnet18", "blocks": None, "head": "linear"})
    network = model.build(settings, 2)
    model.freeze(network.backbone)
    assert model.parameters(network, trainable=True) == 512 * 2 + 2
    assert isinstance(network.head[-1], nn.Linear)
    assert network.head[-1].out_features == 2


CLASSIFIERS = [
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "vgg11_bn",
    "densenet121",
    "convnext_tiny",
    "regnet_y_400mf",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
]


@pytest.mark.parametrize("mode", params.MODES)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_any_classifier_takes_a_step(settings, name, mode):
    changed = settings.model_dump()
    changed["model"] |= {"name": name, "blocks": None, "head": "linear"}
    changed["train"] |= {"batch_size": 4}
    for part in params.MODES:
        changed["train"][part]["epochs"] = 1
    changed["train"]["finetuned"]["first_size"] = 1.0
    pictures = data.Split(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8), torch.arange(4))
    settings = params.Params.model_validate(changed)
    network = model.build(settings.model, 10)
    for module in network.backbone.modules():  # so that random weights pass something on
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    many = torch.randint(0, 256, (32, 32, 32, 3), dtype=torch.uint8)
    network.train()(data.to_input(many, 32))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    device = training.set_up("cpu", 1)
    training.train(network, mode, pictures, pictures, settings, device, lambda *_: None)
    moved = {
        key.partition(".")[0]
        for key, value in network.state_dict().items()
        if not torch.equal(value, before[key])
    }
    assert moved == ({"head"} if mode == "frozen" else {"backbone", "head"})


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "squeezenet1_1"])
def test_a_classifier_can_be_cut_after_any_block(settings, name):
    names = list(model.feature_blocks(model.classifier(name)))
    whole = model.cut(with_weights(name), None).eval()
    picture = torch.randn(1, 3, 64, 64)
    outputs = {}
    for block in names:
        whole.get_submodule(block).register_forward_hook(
            lambda _, __, output, block=block: outputs.update({block: output.clone()})
        )
    whole(picture)
    for count, block in enumerate(names, 1):
        assert torch.equal(model.cut(with_weights(name), count).eval()(picture), outputs[block])


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"name": "mobilenet_v4"}, r"model\.name = 'mobilenet_v4'.*mobilenet_v3_small"),
        ({"blocks": 14}, r"model\.blocks = 14.*13.*features\.12"),
        ({"name": "vgg11", "blocks": None, "image_size": 16}, r"model\.image_size = 16"),
    ],
)
def test_an_impossible_model_is_refused(mobilenet, update, words):
    with pytest.raises(InputError, match=words):
        model.build(mobilenet.model_copy(update=update), 10)


def test_multiply_accumulates_are_counted_as_by_hand():
    blocks = {"conv": nn.Conv2d(3, 8, 3, 2, 1), "flat": nn.Flatten(), "last": nn.Linear(8 * 64, 5)}
    traced = model.trace(blocks, 16)
    assert [b.macs for b in traced.values()] == [3 * 8 * 9 * 8 * 8, 0, 8 * 64 * 5]
    assert [b.shape for b in traced.values()] == [(8, 8, 8), (512,), (5,)]


def test_the_description_tells_what_is_kept_cut_and_replaced(mobilenet):
    text = description.describe(mobilenet, 10)
    lines = {tuple(line.split()[:2]): line for line in text.splitlines() if line.strip()}
    assert "classifier.3 = Linear(in_features=1024, out_features=1000" in text
    assert "40 x" in lines["kept", "features.4"]
    assert "13,736" in lines["kept", "features.4"]
    assert ("cut", "features.5") in lines
    assert "avgpool, classifier: by the head" in text
    assert "24,224  fixed" in text


class TestPretrained:
    @pytest.fixture
    def features(self):
        state = with_weights("mobilenet_v3_small").state_dict()
        return {key: value for key, value in state.items() if key.startswith("features.")}

    def test_a_path_is_read_and_the_part_that_is_cut_off_ignored(
        self, tmp_path, features, mobilenet
    ):
        torch.save(features, tmp_path / "mine.pth")
        network = model.build(mobilenet, 10)
        path = str(tmp_path / "mine.pth")
        model.fill(network.backbone, model.pretrained("mobilenet_v3_small", path), path)
        for key, tensor in network.backbone.state_dict().items():
            assert torch.equal(tensor, features[key])

    def test_other_features_than_the_official_ones_are_refused(
        self, tmp_path, features, monkeypatch
    ):
        monkeypatch.setenv("ASSETS_DIR", str(tmp_path))
        path = tmp_path / "mobilenet_v3_small-IMAGENET1K_V1-features.pth"
        with pytest.raises(InputError, match=f"{path}: .*No such file"):
            model.pretrained("mobilenet_v3_small", "IMAGENET1K_V1")
        torch.save(features, path)
        with pytest.raises(InputError, match=f"{path}: is not the features"):
            model.pretrained("mobilenet_v3_small", "IMAGENET1K_V1")
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(InputError, match=f"{path}: cannot be read"):
            model.pretrained("mobilenet_v3_small", "IMAGENET1K_V1")

    def test_an_official_file_is_held_to_the_checksum_in_its_name(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ASSETS_DIR", str(tmp_path))
        path = tmp_path / "resnet18-f37072fd.pth"
        with pytest.raises(InputError, match=f"{path}: is missing"):
            model.pretrained("resnet18", "IMAGENET1K_V1")
        torch.save(torchvision.models.resnet18().state_dict(), path)
        with pytest.raises(InputError, match=f"{path}: is damaged.*f37072fd"):
            model.pretrained("resnet18", "IMAGENET1K_V1")

    def test_an_unknown_name_is_refused_with_what_there_is(self):
        with pytest.raises(InputError, match=r"model\.weights = 'best'.*IMAGENET1K_V1"):
            model.pretrained("mobilenet_v3_small", "best")

    def test_a_pickle_that_is_no_state_dict_is_refused_unread(self, tmp_path):
        torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
        with pytest.raises(InputError, match=r"module\.pth"):
            model.load_state(tmp_path / "module.pth")

    def test_a_state_that_does_not_fit_is_refused_by_key(self, features, mobilenet):
        network = model.build(mobilenet, 10)
        key = "features.4.block.3.0.weight"
        with pytest.raises(InputError, match=f"here: {key} is .*must be .*40, 96"):
            model.fill(network.backbone, features | {key: torch.zeros(3)}, "here")
        del features[key]
        with pytest.raises(InputError, match=f"here: has no {key}"):
            model.fill(network.backbone, features, "here")
