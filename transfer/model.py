"""The network: the first blocks of a torchvision classifier, a new head, its file, prediction."""

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import Conv2dNormActivation
from tqdm import tqdm

from transfer.data import to_input
from transfer.settings import InputError, ModelSettings

Channels = dict[str, tuple[float, ...]]
# ImageNet's channels on a scale of 0 to 1, with which nearly all of torchvision's weights were
# trained (torchvision.transforms._presets.ImageClassification).
IMAGENET: Channels = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def classifier(name: str) -> nn.Module:
    """torchvision's classifier `name` with random weights, drawn from torch's global generator."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise InputError(f"model.name = {name}: torchvision has {', '.join(names)}")
    return torchvision.models.get_model(name, weights=None)


def block_names(model: nn.Module) -> list[str]:
    """The blocks of `model`'s feature extractor, in the order an image passes them.

    They are the children of `model`, and of its containers `features` and `trunk_output`, up to the
    pooling and the last layer.
    """
    names = []
    for name, child in model.named_children():
        if name in ("avgpool", "dropout", "fc", "classifier", "aux1", "aux2", "AuxLogits"):
            continue
        inner = [f"{name}.{key}" for key, _ in child.named_children()]
        names += inner if name in ("features", "trunk_output") else [name]
    if isinstance(model, torchvision.models.DenseNet):
        names.append("relu")  # a function in torchvision's forward pass
    return names


class Backbone(nn.Module):
    """The first `count` blocks of `model`, all for None: (N, 3, H, W) -> feature map (N, C, h, w).

    torchvision's own forward pass up to there; the state dict of `body` has torchvision's keys.
    """

    body: nn.Module

    def __init__(self, model: nn.Module, count: int | None):
        super().__init__()
        names = block_names(model)
        if count is not None and count > len(names):
            raise InputError(
                f"model.blocks = {count}: {type(model).__name__} has {len(names)} blocks: "
                f"{', '.join(names)}"
            )
        self.body = create_feature_extractor(model, {names[(count or len(names)) - 1]: "map"})

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)["map"]

    @torch.no_grad()
    def channels(self, size: int) -> int:
        """The number C of channels. Raises InputError if images of `size` pixels become no feature
        map (N, C, h, w).
        """
        device = next(self.parameters()).device
        blank = [torch.zeros(1, 3, side, side, device=device) for side in (size, size + 32)]
        try:
            shapes = [self.eval()(x).shape for x in blank]
        except Exception as error:  # networks raise anything for what they do not take
            raise InputError(
                f"model.image_size = {size}: the blocks make no feature map of such images, as "
                "train.finetuned.initial_scale may make them; take larger ones, fewer blocks or a "
                f"convolutional network: {error}"
            ) from None
        if len(shapes[0]) != 4 or shapes[0][1] != shapes[1][1]:  # some transformers: (N, h, w, C)
            raise InputError(
                f"model.blocks: the output {tuple(shapes[0])} is no feature map (N, C, h, w); take "
                "other blocks or a convolutional network"
            )
        return shapes[0][1]


def freeze(backbone: nn.Module) -> None:
    """No gradient, and eval mode: otherwise BatchNorm's running statistics would still change."""
    backbone.requires_grad_(False).eval()


class FoldedConvolution(nn.Module):
    """A convolution and the BatchNorm after it, with fixed statistics, as one convolution.

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
    """A faster `backbone` with the same parameters: BatchNorm is folded into convolutions.

    Returns `backbone` itself if the faster one has another output for `x`, float32 NCHW: not every
    network runs its layers in the order in which it holds them.
    """
    # deepcopy takes what it finds in this dictionary as it is, so that both share their tensors.
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    faster = copy.deepcopy(backbone, shared)
    for parent in list(faster.modules()):
        for (name, layer), (after, norm) in pairwise(list(parent.named_children())):
            both = isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            if both and layer.out_channels == norm.num_features:
                setattr(parent, name, FoldedConvolution(layer, norm))
                setattr(parent, after, nn.Identity())
    with torch.no_grad():
        wanted, got = backbone.eval()(x), faster.eval()(x)
    rounding = 1e-4 * (wanted.abs() + wanted.abs().max())
    return faster if bool(((got - wanted).abs() <= rounding).all()) else backbone


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
    """Give each feature mean 0 and standard deviation SCALE: (N, C) -> (N, C), no parameters."""

    # This quadruples the last layer's effective learning rate: the size of AdamW's steps does not
    # depend on the scale of the features.
    SCALE = 4

    def __init__(self, channels: int):
        super().__init__(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                super().forward(x)  # updates the running statistics
        # The running statistics are used in training too: those of a batch would only add noise.
        return self.SCALE * F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)


def linear_head(channels: int, classes: int, width: int) -> nn.Sequential:
    """The classical new last layer: global mean, then one linear layer. `width` is not used."""
    # Without standardised features, a few epochs end far from the layer's optimum (He et al.,
    # "Masked Autoencoders Are Scalable Vision Learners", 2021, section A.1).
    last = nn.Linear(channels, classes)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Standardise(channels), last)


def conv_head(channels: int, classes: int, width: int) -> nn.Sequential:
    """3x3 convolutions on the feature map, `width` channels, then pooling and a linear layer."""
    return nn.Sequential(
        Conv2dNormActivation(channels, width),
        Residual(width),
        MeanAndMax(),
        nn.Linear(2 * width, classes),
    )


HEADS = {"linear": linear_head, "conv": conv_head}


class Network(nn.Module):
    """A backbone and the head on its feature map: float32 NCHW images -> logits (N, classes).

    `mean` and `std`, float32 (3,), are what the images must be normalised with. The head's logits
    are divided by `temperature`, float32 (), which is 1 until training has ended.
    """

    mean: Tensor
    std: Tensor
    temperature: Tensor

    def __init__(
        self, settings: ModelSettings, classes: list[str], normalisation: Channels = IMAGENET
    ):
        super().__init__()
        self.settings, self.classes = settings, classes
        self.pixels = settings.image_size  # a side of the stored images that it is trained on
        self.backbone = Backbone(classifier(settings.name), settings.blocks)
        channels = self.backbone.channels(settings.image_size)
        self.head = HEADS[settings.head](channels, len(classes), settings.head_width)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                # torchvision's 0.01 in some networks averages over too many past steps.
                module.momentum = settings.batch_norm_momentum
        for name, values in normalisation.items():
            self.register_buffer(name, torch.tensor(values))
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)) / self.temperature


def parameter_count(module: nn.Module, trainable: bool = False) -> int:
    """How many parameters `module` has, or how many of them are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def save(network: Network, path: Path) -> None:
    """Write `network` and what describes it: settings, classes and the size of its images."""
    path.parent.mkdir(exist_ok=True)
    state = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
    facts = {"classes": network.classes, "pixels": network.pixels}
    description = {"model": network.settings.model_dump()} | facts
    path.write_bytes(safetensors.torch.save(state, {"network": json.dumps(description)}))


def load(path: Path | str, device: torch.device | str = "cpu") -> Network:
    """The network that `save` wrote to `path`. Raises InputError if there is none."""
    if not Path(path).is_file():
        raise InputError(f"{path}: is missing; run dvc repro")
    try:
        with safetensors.safe_open(path, "pt") as file:
            description = json.loads(file.metadata()["network"])
        state = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, TypeError, KeyError):  # damaged, or without a description
        raise InputError(f"{path}: is not a complete model of this project") from None
    network = Network(ModelSettings(**description["model"]), description["classes"])
    network.pixels = description["pixels"]
    network.load_state_dict(state)
    # On a CPU, convolutions are 2 to 4 times as fast with channels last (NHWC) in memory.
    return network.to(device).to(memory_format=torch.channels_last)


def chunk_size(image_size: int) -> int:
    """How many images pass at a time where there is no gradient: it bounds memory."""
    return max(1, 256 * 128**2 // max(image_size, 128) ** 2)


@torch.inference_mode()
def predict(
    network: Network, images: Tensor, index: Tensor | None = None, size: int | None = None
) -> Tensor:
    """Logits, float32 (n, classes) on the CPU, of uint8 NHWC `images`.

    By default of all images; else of those at `index`, int64 (n,). They are scaled to `size` pixels
    a side, by default the network's.
    """
    size, mean, std = size or network.settings.image_size, network.mean, network.std
    network.eval()
    index = torch.arange(len(images)) if index is None else index
    logits = []
    for some in tqdm(index.split(chunk_size(size)), "predict", leave=False, disable=None):
        chunk = images[some.to(images.device)].to(mean.device)
        logits.append(network(to_input(chunk, size, mean, std)).cpu())
    return torch.cat(logits)
