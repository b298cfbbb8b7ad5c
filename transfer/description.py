"""A model in words and tables, for someone who wants to see what was kept, cut and replaced."""

from torch import nn

from transfer.model import build, classifier, feature_blocks, parameters, trace
from transfer.params import Model


def table(header: tuple[str, ...], rows: list[tuple]) -> str:
    """Aligned columns; whole numbers with thousands separators, to the right; None is a dash."""
    text = [header] + [
        tuple("-" if c is None else f"{c:,}" if isinstance(c, int) else c for c in row)
        for row in rows
    ]
    aligned = []
    for i, column in enumerate(zip(*text, strict=True)):
        number = any(isinstance(row[i], int) for row in rows)
        width = max(map(len, column))
        aligned.append([cell.rjust(width) if number else cell.ljust(width) for cell in column])
    return "\n".join("  " + "  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def describe(settings: Model, classes: int) -> str:
    """The original model, its blocks, the new model, and what learns in each mode."""
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
        (name, type(child).__name__, parameters(child)) for name, child in original.named_children()
    ]
    containers = {name.partition(".")[0] for name in blocks}
    replaced = [name for name, *_ in children if name not in containers]

    network = build(settings, classes)
    head = {f"head.{name}": module for name, module in network.head.named_children()}
    part = dict.fromkeys(blocks, "cut") | dict.fromkeys(kept, "kept") | dict.fromkeys(head, "new")
    traced = trace(blocks, size) | dict(list(trace(kept | head, size).items())[len(kept) :])
    steps = [
        (part[name], name, b.kind, "-" if b.shape is None else by(b.shape), b.parameters, b.macs)
        for name, b in traced.items()
    ]
    made = traced[list(kept)[-1]].shape
    backbone_count, head_count = parameters(network.backbone), parameters(network.head)
    total = backbone_count + head_count
    tensors = [
        (name, by(tensor.shape), tensor.numel()) for name, tensor in network.named_parameters()
    ]
    return f"""\
{settings.name}, cut after {list(kept)[-1]}, with a new {settings.head} head for {classes} classes

THE ORIGINAL: torchvision's {type(original).__name__}, weights {settings.weights or "random"}

{table(("child", "kind", "parameters"), children)}

  Its last layer was {last_name} = {last}

BLOCK BY BLOCK, for a picture of {size} x {size} pixels

{table(("", "block", "kind", "output C x H x W", "parameters", "MACs"), steps)}

  kept      the first {len(kept)} of {len(blocks)} blocks: the backbone, pictures -> a {
        by(made)
    } feature map
  cut       the other {len(blocks) - len(kept)} blocks
  replaced  {", ".join(replaced)}: by the head
  MACs      multiply-accumulates of the convolutions and linear layers, for one picture

WHAT LEARNS

{
        table(
            ("part", "parameters", "mode frozen", "mode finetuned"),
            [
                ("backbone", backbone_count, "fixed", "learns"),
                ("head", head_count, "learns", "learns"),
                ("total", total, f"{head_count:,} learn", f"{total:,} learn"),
            ],
        )
    }

  In mode frozen the backbone runs in eval mode, so BatchNorm's statistics are fixed too.

EVERY PARAMETER OF THE NEW MODEL

{table(("name", "shape", "parameters"), tensors)}
"""
