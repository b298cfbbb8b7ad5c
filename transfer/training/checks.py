"""What would make training fail, or its result useless, refused early and by name."""

import torch
from torch import Tensor, nn

from transfer.common.arrays import Split
from transfer.common.errors import InputError
from transfer.common.machine import free_memory
from transfer.common.params import Params
from transfer.model.network import Network, parameter_count, trace
from transfer.training.batches import image_size_in
from transfer.training.processes import process


def check_settings(network: Network, mode: str, data: Split, params: Params) -> None:
    """Raise InputError where `params` do not fit `data` or the backbone of `network`."""
    max_shift, processes = params.train.shared.max_shift, process()[1]
    if len(data.labels) < 2 * processes:
        raise InputError(
            f"train.shared.images = {params.train.shared.images}: each of the {processes} "
            f"processes needs two training images or more; there are {len(data.labels)}"
        )
    side = min(data.images.shape[1:3])
    if max_shift >= side:
        raise InputError(
            f"train.shared.max_shift = {max_shift}: the images have only {side} pixels a side"
        )
    smallest = image_size_in(0, mode, params)
    if trace({"backbone": network.backbone}, smallest)["backbone"].shape is None:
        raise InputError(
            f"train.finetuned.initial_scale = {params.train.finetuned.initial_scale:g}: the "
            f"backbone makes no feature map of images of {smallest} pixels a side, as the first "
            "epoch has them; raise it"
        )


def check_memory(learner: nn.Module, x: Tensor, count: int, params: Params) -> None:
    """Raise InputError if a step on `count` of what `x` holds one of cannot fit into memory.

    A step needs what autograd keeps for each image, as much again for what passes between
    layers, and each parameter four times: itself, its gradient and AdamW's two moments.
    """
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    learner.eval()  # BatchNorm's statistics must not move
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner(x)
    needed = 2 * sum(kept.values()) * count + 16 * parameter_count(learner)
    free = torch.cuda.mem_get_info()[0] if x.device.type == "cuda" else free_memory()
    if needed > free:
        raise InputError(
            f"train.shared.batch_size = {params.train.shared.batch_size}, model.image_size = "
            f"{params.model.image_size}: a step needs about {needed / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} are free; lower one of them"
        )


def check_losses(losses: list[Tensor], rates: list[list[float]], where: str) -> None:
    """Raise InputError, which says `where`, when a loss of an epoch's steps is not finite.

    `rates` are the learning rates of each step. Done once an epoch, as it waits for the device.
    """
    values = torch.stack(losses)
    if bad := (~values.isfinite()).nonzero().flatten().tolist():
        step = bad[0]
        shown = " and ".join(f"{rate:.3g}" for rate in dict.fromkeys(rates[step]))
        raise InputError(
            f"{where}, step {step + 1}: the loss is {values[step].item()} at learning rates "
            f"{shown}; lower them in params.yaml"
        )


def check_outputs(logits: Tensor, where: str) -> None:
    """Raise InputError, which says `where`, when a unit of the last layer is dead."""
    if dead := (logits == logits[0]).all(0).nonzero().flatten().tolist():
        raise InputError(
            f"{where}: outputs {dead} of the head are dead units, with the same value for every "
            "image; lower the learning rates in params.yaml"
        )


def check_unchanged(backbone: nn.Module, before: dict[str, Tensor]) -> None:
    """Raise InputError unless the state dict of `backbone` is `before`, bit for bit."""
    if not all(torch.equal(after, before[key]) for key, after in backbone.state_dict().items()):
        raise InputError("the backbone has changed although mode frozen must not change it")
