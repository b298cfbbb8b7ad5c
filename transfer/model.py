"""The network: a backbone cut from torchvision's classifiers, a new head, its weights on disk."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import Conv2dNormActivation

from transfer.common.errors import InputError, memory_is_exhausted
from transfer.common.files import write_bytes
from transfer.common.settings import ModelSettings

# The means and standard deviations of ImageNet's channels on a scale of 0 to 1, with which nearly
# all of torchvision's weights were trained (torchvision.transforms._presets.ImageClassification).
Channels = dict[str, tuple[float, ...]]
IMAGENET: Channels = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# What follows the feature extractor in torchvision's classifiers.
AFTER_FEATURES = ("avgpool", "dropout", "fc", "classifier", "aux1", "aux2", "AuxLogits")


def classifier(name: str) -> nn.Module:
    """torchvision's classifier `name` with random weights, drawn from torch's global generator."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise InputError(f"model.name = {name!r}: torchvision has {', '.join(names)}")
    return torchvision.models.get_model(name, weights=None)


def normalisation(name: str, weights: str | None) -> Channels:
    """The mean and std of the channels that torchvision's `weights` for `name` were trained with.

    A file in weights/ with the name of an official one has the same. ImageNet's for random weights
    and for other state dicts of your own.
    """
    official = dict(torchvision.models.get_model_weights(name).__members__)
    official |= {Path(urlparse(entry.url).path).name: entry for entry in official.values()}
    weights = Path(weights or "").name
    if weights not in official:
        return IMAGENET
    if hasattr(classifier(name), "transform_input"):  # forward changes the normalisation to this
        return {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    preset = official[weights].transforms()
    return {"mean": tuple(preset.mean), "std": tuple(preset.std)}


def feature_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of `model`'s feature extractor by name, in the order an image passes them.

    They are the children of `model`, and of its containers `features` and `trunk_output`, up to
    the pooling and the last layer. The names are the prefixes of torchvision's state dict.
    """
    blocks: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if name in ("features", "trunk_output"):
            blocks |= {f"{name}.{inner}": block for inner, block in child.named_children()}
        elif name not in AFTER_FEATURES:
            blocks[name] = child
    if isinstance(model, torchvision.models.DenseNet):
        blocks["relu"] = nn.ReLU(inplace=True)  # torchvision's forward calls it as a function
    return blocks


def cut(model: nn.Module, count: int | None) -> nn.Sequential:
    """The first `count` blocks of `model` (all for None): (N, 3, H, W) -> (N, C, h, w).

    Its state dict has torchvision's own keys. Raises InputError if there are fewer blocks.
    """
    blocks = feature_blocks(model)
    if count is not None and count > len(blocks):
        raise InputError(
            f"model.blocks = {count}: {type(model).__name__} has {len(blocks)}: {', '.join(blocks)}"
        )
    backbone = nn.Sequential()
    for name, block in list(blocks.items())[:count]:
        container, _, child = name.rpartition(".")
        if container and container not in dict(backbone.named_children()):
            backbone.add_module(container, nn.Sequential())
        backbone.get_submodule(container).add_module(child, block)
    return backbone


def nearly_equal(got: Tensor, wanted: Tensor) -> bool:
    """Whether two ways to compute the same, float32, differ by no more than rounding may."""
    size = wanted.abs()
    return bool(((got - wanted).abs() <= 1e-4 * (size + size.max())).all())


def check_blocks(settings: ModelSettings) -> None:
    """Raise InputError unless the kept blocks, one after another, compute what they compute inside
    torchvision's forward pass, which may do more between them, as that of vision transformers.
    """
    original = classifier(settings.name).eval()
    backbone = cut(original, settings.blocks)
    kept = list(feature_blocks(original).values())[: settings.blocks]
    outputs: list[Tensor] = []
    for block in set(kept) & set(original.modules()):
        block.register_forward_hook(lambda _, __, output: outputs.append(output.clone()))
    image = torch.rand(1, 3, 224, 224)  # some take no other size
    try:
        with torch.inference_mode():
            original(image)
            count = len(outputs)
            backbone(image)
        pairs = zip(outputs[:count], outputs[count:], strict=True)
        same = all(nearly_equal(*pair) for pair in pairs)
    except Exception as error:  # a block that is given what it does not take raises anything
        if memory_is_exhausted(error):
            raise
        same = False
    if not same:
        raise InputError(
            f"model.name = {settings.name!r}: torchvision's forward pass is more than its first "
            f"{len(kept)} blocks one after another; take a convolutional network or fewer blocks"
        )


def freeze(backbone: nn.Module) -> None:
    """No gradient, and eval mode, so that BatchNorm's statistics do not change either."""
    backbone.requires_grad_(False).eval()


class ConvolutionWithNorm(nn.Module):
    """A convolution and the BatchNorm after it, its statistics fixed, computed as one convolution.

    NCHW -> NCHW. The weights are combined in each step, so both have their own gradients.
    """

    def __init__(self, convolution: Any, norm: Any):
        super().__init__()
        self.convolution, self.norm = convolution, norm

    def forward(self, x: Tensor) -> Tensor:
        scale = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
        bias = self.norm.bias - self.norm.running_mean * scale
        if self.convolution.bias is not None:
            bias = bias + self.convolution.bias * scale
        weight = self.convolution.weight * scale[:, None, None, None]
        return self.convolution._conv_forward(x, weight, bias)


def folded(backbone: nn.Module, x: Tensor) -> nn.Module:
    """A faster `backbone` with the same parameters: each BatchNorm after a convolution is folded
    into it, with fixed statistics.

    Returns `backbone` itself where the faster one has another output for `x`, float32 NCHW, as
    where a network runs its layers in another order than it holds them. Other BatchNorm stays as it
    is.
    """
    # What deepcopy finds in this dictionary, it takes as it is instead of copying it.
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    faster = copy.deepcopy(backbone, shared)
    for parent in list(faster.modules()):
        for (name, layer), (after, norm) in pairwise(list(parent.named_children())):
            both = isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            if both and layer.out_channels == norm.num_features:
                setattr(parent, name, ConvolutionWithNorm(layer, norm))
                setattr(parent, after, nn.Identity())
    with torch.no_grad():
        wanted, got = backbone.eval()(x), faster.eval()(x)
    return faster if nearly_equal(got, wanted) else backbone


class Residual(nn.Module):
    """Two 3x3 convolutions and a skip connection (He et al. 2015): NCHW -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            Conv2dNormActivation(channels, channels), Conv2dNormActivation(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolutions(x)


class MeanAndMax(nn.Module):
    """Pool a feature map to each channel's mean and maximum: (N, C, h, w) -> (N, 2C)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


class Standardise(nn.BatchNorm1d):
    """Give each feature mean 0 and standard deviation SCALE: (N, C) -> (N, C), without parameters.

    It uses its running statistics also in training: those of each batch would only add noise.
    """

    SCALE = 4  # AdamW's steps do not depend on it, so that each changes the logits 4 times as much

    def __init__(self, channels: int):
        super().__init__(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                super().forward(x)  # brings the running statistics up to date
        return self.SCALE * F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)


def linear_head(channels: int, classes: int, width: int) -> nn.Sequential:
    """The classical new last layer: global mean, then one linear layer. `width` is not used.

    Between them the features are standardised, as linear probes do, without parameters: otherwise
    a training of a few epochs ends far from the layer's optimum (He et al., "Masked Autoencoders
    Are Scalable Vision Learners", 2021, section A.1).
    """
    last = nn.Linear(channels, classes)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Standardise(channels), last)


def conv_head(channels: int, classes: int, width: int) -> nn.Sequential:
    """Convolutions on the feature map, `width` channels, before it is pooled."""
    return nn.Sequential(
        Conv2dNormActivation(channels, width),
        Residual(width),
        MeanAndMax(),
        nn.Linear(2 * width, classes),
    )


HEADS = {"linear": linear_head, "conv": conv_head}


class Block(NamedTuple):
    """One block as `measure_blocks` saw it: its class, output shape (C, h, w), parameters, and
    multiply-accumulates; no shape and no MACs from the block on that the image is too small for.
    """

    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    macs: int | None


def measure_blocks(
    blocks: dict[str, nn.Module], image_size: int, device: torch.device | None = None
) -> dict[str, Block]:
    """Send one blank image of `image_size` pixels a side through `blocks`, which are on `device`
    (the CPU by default) and are left in eval mode.
    """
    seen = {}
    x: Tensor | None = torch.zeros(1, 3, image_size, image_size, device=device)
    for name, block in blocks.items():
        shape = macs = None
        if x is not None:
            try:
                with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                    x = block.eval()(x)
                shape = tuple(x.shape[1:])
                macs = counter.get_total_flops() // 2  # one multiplies and one adds
            except RuntimeError as error:
                if memory_is_exhausted(error):
                    raise
                x = None
        seen[name] = Block(type(block).__name__, shape, parameter_count(block), macs)
    return seen


def parameter_count(module: nn.Module, trainable: bool = False) -> int:
    """How many parameters `module` has, or how many of them are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


class Network(nn.Module):
    """A backbone and the head on its feature map: float32 NCHW images -> logits (N, classes).

    `mean` and `std`, float32 (3,), are what the images must be normalised with, as those were that
    the backbone was trained on: ImageNet's by default. The head's logits are divided by
    `temperature`, float32 (), which is 1 until the network is calibrated.
    """

    mean: Tensor
    std: Tensor
    temperature: Tensor

    def __init__(
        self, backbone: nn.Module, head: nn.Sequential, normalisation: Channels = IMAGENET
    ):
        super().__init__()
        self.backbone = backbone
        self.head = head
        for name, values in normalisation.items():
            self.register_buffer(name, torch.tensor(values))
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)) / self.temperature


def build(settings: ModelSettings, classes: int, normalisation: Channels = IMAGENET) -> Network:
    """The network that `settings` describe, with random weights.

    Raises InputError where the image size leaves no feature map.
    """
    backbone = cut(classifier(settings.name), settings.blocks)
    size = settings.image_size
    shape, larger = (measure_blocks({"": backbone}, side)[""].shape for side in (size, size + 32))
    if shape is None or len(shape) != 3:
        raise InputError(
            f"model.image_size = {size}: the blocks that are kept make no feature map of it; take "
            "larger images or fewer blocks"
        )
    if larger and larger[0] != shape[0]:
        raise InputError(
            f"model.name = {settings.name!r}, model.blocks = {settings.blocks}: the number of "
            f"channels, {shape[0]}, changes with the image size: the output is not (N, C, h, w)"
        )
    head = HEADS[settings.head](shape[0], classes, settings.head_width)
    network = Network(backbone, head, normalisation)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            # torchvision's 0.01 in some networks averages over too many past steps.
            module.momentum = settings.batch_norm_momentum
    return network


def save_weights(path: Path, module: nn.Module) -> None:
    """Write `module`'s state dict to `path` as safetensors."""
    state = {key: value.cpu().contiguous() for key, value in module.state_dict().items()}
    write_bytes(path, safetensors.torch.save(state))


def fill(module: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load `state`, in any precision, into `module`, which lacks the keys of what was cut off.

    Old checkpoints lack num_batches_tracked; it is not used. Raises InputError, which starts
    with `origin`, when another key is missing or a tensor does not fit.
    """
    wanted = module.state_dict()
    optional = {key for key in wanted if key.endswith(".num_batches_tracked")}
    if missing := [key for key in wanted if key not in optional and key not in state]:
        raise InputError(
            f"{origin}: has no {missing[0]}: it must be the whole state dict of such a network, "
            "with BatchNorm's statistics"
        )
    loaded = {key: wanted[key] if key in optional else state[key] for key in wanted}
    for key, tensor in loaded.items():
        same_kind = tensor.is_floating_point() == wanted[key].is_floating_point()
        if tensor.shape != wanted[key].shape or not same_kind:
            raise InputError(
                f"{origin}: {key} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"must be {wanted[key].dtype} {tuple(wanted[key].shape)}"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{origin}: {key} holds values that are not finite")
    module.load_state_dict(loaded)


def load_network(
    settings: ModelSettings, classes: int, path: Path, device: torch.device
) -> Network:
    """The network that `save_weights` wrote to `path`, on `device`, as `build` describes it.

    Raises InputError when the file is missing or damaged, or holds another network.
    """
    network = build(settings, classes)
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}; run dvc repro") from None
    fill(network, state, str(path))
    return network.to(device).to(memory_format=torch.channels_last)
