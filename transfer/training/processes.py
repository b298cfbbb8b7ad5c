"""One training in several processes, which torchrun starts, each on its share of every batch."""

import atexit
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from transfer.common.arrays import Split
from transfer.common.errors import InputError
from transfer.common.params import Params

TIMEOUT = timedelta(minutes=10)  # a process that waits longer for another one fails


def join(device: torch.device) -> None:
    """Join the processes that torchrun started; without torchrun, do nothing.

    Some clusters set WORLD_SIZE and the like for every process: these alone do not count. Raises
    InputError, which says who was waited for, when the others do not come in time.
    """
    if not dist.is_torchelastic_launched():
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    count, address = os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]
    try:
        with _default_signals():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        port, reason = os.environ.get("MASTER_PORT"), str(error).splitlines()[0]
        raise InputError(
            f"torchrun: waited for {count} processes at {address}:{port}: {reason}"
        ) from None
    atexit.register(dist.destroy_process_group)


@contextmanager
def _default_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the process at once: torch waits where Python cannot react."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def process() -> tuple[int, int]:
    """This process's number, from 0, and how many torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(value: Any) -> Any:
    """The first process's `value`, in every process that torchrun started."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def share_of_data(data: Split) -> Split:
    """The images that this process trains on: every one its own, all equally many."""
    rank, processes = process()
    each = len(data.labels) // processes
    return Split(*(tensor[rank::processes][:each] for tensor in data))


def share_of_batch(params: Params) -> int:
    """How many images of each batch this process computes."""
    _, processes = process()
    batch_size = params.train.shared.batch_size
    share, left = divmod(batch_size, processes)
    if left or share < 2:
        raise InputError(
            f"train.shared.batch_size = {batch_size}: the {processes} processes that torchrun "
            "started must each get equally many images, two or more"
        )
    return share
