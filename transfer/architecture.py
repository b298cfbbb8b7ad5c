"""The architecture in tables, for someone who wants to see what was kept, cut and replaced."""

from collections.abc import Iterable, Sequence

import torch
from tabulate import tabulate
from torch import nn

from transfer.common.settings import ModelSettings
from transfer.model import (
    ConvolutionWithNorm,
    build,
    classifier,
    feature_blocks,
    folded,
    freeze,
    measure_blocks,
    normalisation,
    parameter_count,
)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = tabulate(rows, header, "plain", intfmt=",", missingval="-")
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _list(channels: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in channels) + ")"


def describe(settings: ModelSettings, classes: int) -> str:
    """The original network, its blocks, the new network, and what is trained in each mode."""
    size = settings.image_size
    original = classifier(settings.name)
    blocks = feature_blocks(original)
    kept = dict(list(blocks.items())[: settings.blocks])
    last_name, last = [
        (name, module)
        for name, module in original.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ][-1]
    children = [
        (name, type(child).__name__, parameter_count(child))
        for name, child in original.named_children()
    ]
    containers = {name.partition(".")[0] for name in blocks}
    replaced = [name for name, *_ in children if name not in containers]

    network = build(settings, classes)
    head = {f"head.{name}": module for name, module in network.head.named_children()}
    part = dict.fromkeys(blocks, "cut") | dict.fromkeys(kept, "kept") | dict.fromkeys(head, "new")
    new = measure_blocks(kept | head, size)
    measured = measure_blocks(blocks, size) | {name: new[name] for name in head}
    steps = [
        (part[name], name, b.kind, "-" if b.shape is None else _by(b.shape), b.parameters, b.macs)
        for name, b in measured.items()
    ]
    made = _by(measured[list(kept)[-1]].shape or ())
    backbone_count, head_count = parameter_count(network.backbone), parameter_count(network.head)
    total = backbone_count + head_count
    tensors = [(name, _by(t.shape), t.numel()) for name, t in network.named_parameters()]
    trained = [
        ("backbone", backbone_count, "fixed", "trained"),
        ("head", head_count, "trained", "trained"),
        ("total", total, f"{head_count:,} trained", f"{total:,} trained"),
    ]
    freeze(network.backbone)
    faster = folded(network.backbone, torch.rand(1, 3, size, size))
    layers, inside = (
        sum(isinstance(part, kind) for part in faster.modules())
        for kind in (nn.BatchNorm2d, ConvolutionWithNorm)
    )
    mean, std = (_list(c) for c in normalisation(settings.name, settings.weights).values())
    return f"""\
{settings.name}, cut after {list(kept)[-1]}, with a new {settings.head} head for {classes} classes

THE ORIGINAL: torchvision's {type(original).__name__}, weights {settings.weights or "random"}

{_table(("child", "kind", "parameters"), children)}

  Its last layer was {last_name} = {last}

BLOCK BY BLOCK, for an image of {size} x {size} pixels

{_table(("", "block", "kind", "output C x H x W", "parameters", "MACs"), steps)}

  input     float32, normalised with mean {mean} and std {std}
  kept      the first {len(kept)} of {len(blocks)} blocks: image -> feature map, {made}
  cut       the other {len(blocks) - len(kept)} blocks
  replaced  {", ".join(replaced)}: by the head
  MACs      multiply-accumulates of the convolutions and linear layers, for one image

WHAT IS TRAINED

{_table(("part", "parameters", "mode frozen", "mode finetuned"), trained)}

  In mode frozen the backbone runs in eval mode, so BatchNorm's statistics are also fixed.
  {inside} of its {layers} BatchNorm layers are then folded into the convolution before them.
  In mode finetuned they are folded after train.finetuned.batch_norm_until of the epochs.

EVERY PARAMETER OF THE NEW NETWORK

{_table(("name", "shape", "parameters"), tensors)}
"""
