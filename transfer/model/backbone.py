"""torchvision's classifiers, and a backbone cut from one after its first blocks."""

from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.fx.experimental.optimization import matches_module_pattern

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

    `backbone` itself where torch cannot trace it, or where `x`, float32 NCHW, comes out otherwise.
    """
    try:
        traced = symbolic_trace(backbone)
        modules = dict(traced.named_modules())
        for node in traced.graph.nodes:
            if matches_module_pattern((nn.Conv2d, nn.BatchNorm2d), node, modules):
                before: Any = node.args[0]
                if len(before.users) == 1:
                    both = ConvolutionWithNorm(modules[before.target], modules[node.target])
                    traced.set_submodule(before.target, both)
                    node.replace_all_uses_with(before)
                    traced.graph.erase_node(node)
        traced.recompile()
        with torch.no_grad():
            wanted, got = backbone.eval()(x), traced.eval()(x)
        close = torch.allclose(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    except Exception:  # tracing runs the code of any backbone with stand-ins for tensors
        close = False
    return traced if close else backbone
