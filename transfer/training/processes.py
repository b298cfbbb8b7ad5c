"""One training in several processes, which torchrun starts, each on its part of every batch."""

import atexit
import os
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from transfer.common.dataset import Split
from transfer.common.errors import InputError
from transfer.common.run import under_torchrun
from transfer.common.settings import Params

TIMEOUT = timedelta(minutes=10)  # a process that waits longer for another one fails


def join(device: torch.device) -> None:
    """Join the processes that torchrun started; without torchrun, do nothing.

    Raises InputError, which says who was waited for, when the others do not come in time.
    """
    if not under_torchrun():
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        count, address, port = (
            os.environ[name] for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        )
        raise InputError(
            f"torchrun: waited for {count} processes at {address}:{port}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    atexit.register(dist.destroy_process_group)


def rank() -> int:
    """The number of this process among those that torchrun started, from 0; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    """How many processes torchrun started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(value: Any) -> Any:
    """The first process's `value`, in every process that torchrun started."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def data_of_process(data: Split, params: Params) -> Split:
    """The images that this process trains on: no other has them, and all have equally many."""
    each = len(data.labels) // process_count()
    if each < 2:
        raise InputError(
            f"train.shared.images = {params.train.shared.images or 'null'}: there must be two "
            f"training images or more for each process ({process_count()}); there are "
            f"{len(data.labels)}"
        )
    return Split(*(tensor[rank() :: process_count()][:each] for tensor in data))


def batch_size_per_process(params: Params) -> int:
    """How many images of each batch this process computes."""
    batch_size, processes = params.train.shared.batch_size, process_count()
    size, left = divmod(batch_size, processes)
    if left or size < 2:
        raise InputError(
            f"train.shared.batch_size = {batch_size}: the {processes} processes that torchrun "
            "started must each get equally many images, two or more"
        )
    return size
