"""The network: a cut backbone and a new head; its size, its weights in and out."""

from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from transfer.common.errors import InputError
from transfer.common.files import write_bytes
from transfer.common.params import Model
from transfer.model.backbone import classifier, cut
from transfer.model.heads import HEADS


class Block(NamedTuple):
    """One block as `trace` saw it: its class, output shape (C, h, w), parameters, and
    multiply-accumulates; no shape and no MACs from the block on that the image is too small for.
    """

    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    macs: int | None


def trace(blocks: dict[str, nn.Module], image_size: int) -> dict[str, Block]:
    """Send one blank image of `image_size` pixels a side through `blocks`, in eval mode."""
    seen = {}
    x: Tensor | None = torch.zeros(1, 3, image_size, image_size)
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
        seen[name] = Block(type(block).__name__, shape, parameter_count(block), macs)
    return seen


def parameter_count(module: nn.Module, trainable: bool = False) -> int:
    """How many parameters `module` has, or how many of them are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


class Network(nn.Module):
    """A backbone and the head on its feature map: float32 NCHW images -> logits (N, classes)."""

    def __init__(self, backbone: nn.Module, head: nn.Sequential):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def build(settings: Model, classes: int) -> Network:
    """The network that `settings` describe, with random weights.

    Raises InputError where the image size leaves no feature map.
    """
    backbone = cut(classifier(settings.name), settings.blocks)
    shape = trace({"backbone": backbone}, settings.image_size)["backbone"].shape
    if shape is None or len(shape) != 3:
        raise InputError(
            f"model.image_size = {settings.image_size}: the blocks that are kept make no feature "
            "map of it; take larger images or fewer blocks"
        )
    network = Network(backbone, HEADS[settings.head](shape[0], classes, settings.head_width))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            # torchvision's 0.01 in some networks averages over too many past steps.
            module.momentum = settings.batch_norm_momentum
    return network


def save_weights(path: Path, module: nn.Module) -> None:
    """Write `module`'s state dict to `path` as safetensors."""
    state = {key: value.cpu().contiguous() for key, value in module.state_dict().items()}
    write_bytes(path, safetensors.torch.save(state))


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict that `save_weights` wrote to `path`, on the CPU."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}; run dvc repro") from None


def fill(module: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load `state` into `module`; keys that `module` lacks are the part that was cut off.

    Raises InputError, which starts with `origin`, when a key is missing or a tensor does not fit.
    """
    wanted = module.state_dict()
    for key, tensor in wanted.items():
        if key not in state:
            raise InputError(f"{origin}: has no {key}")
        if state[key].shape != tensor.shape or state[key].dtype != tensor.dtype:
            raise InputError(
                f"{origin}: {key} is {state[key].dtype} {tuple(state[key].shape)}, "
                f"must be {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() and not state[key].isfinite().all():
            raise InputError(f"{origin}: {key} holds values that are not finite")
    module.load_state_dict({key: state[key] for key in wanted})


def load_trained(settings: Model, classes: int, path: Path, device: torch.device) -> Network:
    """The network that training saved to `path`, on `device`, as `build` describes it.

    Raises InputError when the file is missing or damaged, or holds another network.
    """
    network = build(settings, classes)
    fill(network, load_weights(path), str(path))
    return network.to(device).to(memory_format=torch.channels_last)
