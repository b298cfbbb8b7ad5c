"""Cut a torchvision classifier after its first blocks, put a new head on it, describe it."""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import Conv2dNormActivation

from transfer.download import fetch
from transfer.errors import InputError
from transfer.files import sha256, write_bytes
from transfer.params import Model

DIGEST = "content digest"  # its name among a model file's metadata

# What follows the feature extractor in torchvision's classifiers.
AFTER_FEATURES = ("avgpool", "dropout", "fc", "classifier", "aux1", "aux2", "AuxLogits")

# sha256 (see `content_digest`) of the "features.*" tensors of torchvision's checkpoints, for
# those that may come without their classifier: the file of mobilenet_v3_small with sha256
# 047dcff4addef86ea5bc2eff13c9614dc11f47ab1160d0a71a25e7db994f4e1f.
FEATURES_DIGEST = {
    ("mobilenet_v3_small", "IMAGENET1K_V1"): (
        "ada23de2f2263e0dccc27ab4f0d06881ac08dc4126fdd87020a3c1d7aa40a21a"
    ),
}


def classifier(name: str) -> nn.Module:
    """torchvision's classifier `name` with random weights, drawn from torch's global generator."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise InputError(f"model.name = {name!r}: torchvision has {', '.join(names)}")
    return torchvision.models.get_model(name, weights=None)


def feature_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of `model`'s feature extractor by name, in the order a picture passes them.

    They are the children of `model`, and of its containers `features` and `trunk_output`, up to
    the pooling and the last layer. The names are the prefixes of torchvision's state dict.
    """
    blocks = {}
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


class Block(NamedTuple):
    """One block as `trace` saw it: its class, output shape (C, h, w), parameters, and
    multiply-accumulates; no shape and no MACs from the block on that the picture is too small for.
    """

    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    macs: int | None


def trace(blocks: dict[str, nn.Module], image_size: int) -> dict[str, Block]:
    """Send one blank picture of `image_size` pixels a side through `blocks`, in eval mode."""
    seen = {}
    x = torch.zeros(1, 3, image_size, image_size)
    for name, block in blocks.items():
        shape = macs = None
        if x is not None:
            try:
                with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                    x = block.eval()(x)
                shape = tuple(x.shape[1:])
                macs = counter.get_total_flops() // 2  # one multiplies and one adds
            except RuntimeError:
                x = None
        seen[name] = Block(type(block).__name__, shape, parameters(block), macs)
    return seen


def parameters(module: nn.Module, trainable: bool = False) -> int:
    """How many parameters `module` has, or how many of them learn."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


class Residual(nn.Module):
    """Two 3x3 convolutions and a way around them (He et al. 2015): NCHW -> the same shape."""

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


def linear_head(channels: int, classes: int) -> nn.Sequential:
    """The classical new last layer: global mean, then one linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def conv_head(channels: int, classes: int) -> nn.Sequential:
    """A head that looks at the feature map before it is pooled."""
    width = 128
    return nn.Sequential(
        Conv2dNormActivation(channels, width),
        Residual(width),
        MeanAndMax(),
        nn.Linear(2 * width, classes),
    )


HEADS = {"linear": linear_head, "conv": conv_head}


def build(settings: Model, classes: int) -> nn.Sequential:
    """The cut backbone and a new head, children `backbone` and `head`, with random weights.

    float32 NCHW pictures, `settings.image_size` pixels a side -> logits (N, classes).
    """
    backbone = cut(classifier(settings.name), settings.blocks)
    shape = trace({"backbone": backbone}, settings.image_size)["backbone"].shape
    if shape is None or len(shape) != 3:
        raise InputError(
            f"model.image_size = {settings.image_size}: the blocks that are kept make no feature "
            "map of it; take a larger picture or fewer blocks"
        )
    model = nn.Sequential()
    model.add_module("backbone", backbone)
    model.add_module("head", HEADS[settings.head](shape[0], classes))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # torchvision's 0.01 in some networks would average over steps too long gone.
            module.momentum = 0.1  # torch's default
    return model


def freeze(backbone: nn.Module) -> None:
    """No gradient, and eval mode, so that BatchNorm's statistics stay as they came."""
    backbone.requires_grad_(False).eval()


def content_digest(state: dict[str, Tensor]) -> str:
    """sha256 over each key and the little-endian bytes of its tensor, in the keys' order."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def pretrained(name: str, weights: str) -> dict[str, Tensor]:
    """The state dict that `weights` stands for: the name of torchvision weights, or a path.

    Official weights come from the folder ASSETS_DIR, as the official file or as
    NAME-WEIGHTS-features.pth, or else from torch's cache or a download; each is checked against its
    sha256. Raises InputError when they are missing or not what the checksum says.
    """
    official = torchvision.models.get_model_weights(name).__members__
    if weights not in official:
        if not Path(weights).is_file():
            raise InputError(
                f"model.weights = {weights!r}: neither a file nor one of {', '.join(official)}"
            )
        return load_state(Path(weights))
    url = official[weights].url
    file_name = Path(urlparse(url).path).name
    assets = os.environ.get("ASSETS_DIR")
    folder = Path(assets) if assets else Path(torch.hub.get_dir(), "checkpoints")
    path, features = folder / file_name, folder / f"{name}-{weights}-features.pth"
    if assets and not path.exists() and (name, weights) in FEATURES_DIGEST:
        state = load_state(features)
        if content_digest(state) != FEATURES_DIGEST[name, weights]:
            raise InputError(f"{features}: is not the features of torchvision's {weights}")
        return state
    prefix = path.stem.rpartition("-")[2]  # torchvision names a file by its sha256's start
    if not assets:
        fetch(url, path, "sha256", prefix)
    elif not path.is_file():
        raise InputError(f"{path}: is missing")
    elif not sha256(path).startswith(prefix):
        raise InputError(f"{path}: is damaged or altered: its sha256 does not start with {prefix}")
    return load_state(path)


def load_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict: .safetensors, or torch's format, of which no code is unpickled.

    Raises InputError when it cannot be read or is not what `save_state` wrote.
    """
    digest = None
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                digest = (file.metadata() or {}).get(DIGEST)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if zipfile.is_zipfile(path) and (record := zipfile.ZipFile(path).testzip()):
                raise InputError(f"the checksum of {record} does not fit")
    except Exception as error:  # torch.load has no common base for what it raises on bad files
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as a state dict: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: must be a state dict: names and tensors")
    if digest not in (None, content_digest(state)):
        raise InputError(f"{path}: is damaged or altered: its tensors do not fit its digest")
    return state


def save_state(path: Path, module: nn.Module) -> None:
    """Write `module`'s state dict as safetensors, with its `content_digest`."""
    state = {key: value.cpu().contiguous() for key, value in module.state_dict().items()}
    write_bytes(path, safetensors.torch.save(state, {DIGEST: content_digest(state)}))


def fill(module: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load `state` into `module`; keys that `module` lacks are the part that was cut off."""
    wanted = module.state_dict()
    for key, tensor in wanted.items():
        if key not in state:
            raise InputError(f"{origin}: has no {key}")
        if state[key].shape != tensor.shape or state[key].dtype != tensor.dtype:
            raise InputError(
                f"{origin}: {key} is {state[key].dtype} {tuple(state[key].shape)}, "
                f"must be {tensor.dtype} {tuple(tensor.shape)}"
            )
    module.load_state_dict({key: state[key] for key in wanted})


def trained(settings: Model, classes: int, path: Path, device: torch.device) -> nn.Sequential:
    """The network that training saved to `path`, on `device`, as `build` describes it.

    Raises InputError when the file is missing or damaged, or holds another network.
    """
    if not path.is_file():
        raise InputError(f"{path}: is missing; run dvc repro")
    network = build(settings, classes)
    fill(network, load_state(path), str(path))
    return network.to(device, memory_format=torch.channels_last)
