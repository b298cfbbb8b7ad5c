"""torchvision's classifiers, and a backbone cut from one after its first blocks."""

import copy

import torch
import torchvision
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from transfer.common.errors import InputError

# What follows the feature extractor in torchvision's classifiers.
AFTER_FEATURES = ("avgpool", "dropout", "fc", "classifier", "aux1", "aux2", "AuxLogits")


def classifier(name: str) -> nn.Module:
    """torchvision's classifier `name` with random weights, drawn from torch's global generator."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise InputError(f"model.name = {name!r}: torchvision has {', '.join(names)}")
    return torchvision.models.get_model(name, weights=None)


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


def freeze(backbone: nn.Module) -> None:
    """No gradient, and eval mode, so that BatchNorm's statistics do not change either."""
    backbone.requires_grad_(False).eval()


@torch.no_grad()
def folded(backbone: nn.Module, x: Tensor) -> nn.Module:
    """A faster copy of a frozen `backbone`, the scales and shifts of BatchNorm folded into the
    convolutions before it; `backbone` itself where torch cannot do that, or `x`, float32 NCHW,
    comes out otherwise.
    """
    try:
        copied = fuse(copy.deepcopy(backbone))
        wanted, got = backbone(x), copied(x)
        close = torch.allclose(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    except Exception:  # tracing runs the code of any backbone with stand-ins for tensors
        close = False
    return copied if close else backbone
