"""The training loop of both modes."""

import atexit
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from transfer import checkpoint
from transfer.data import Split, augment, shuffled_batches, to_input
from transfer.errors import InputError
from transfer.model import content_digest, freeze, parameters, trace
from transfer.params import Params

WARM_UP = 0.2  # share of the steps in which the learning rates climb to their peak
CHUNK = 256  # pictures of 128 pixels a side that go through at a time where there is no gradient
CACHE_BYTES = 2 * 2**30  # of cached feature maps; keeps the whole process under 4 GB

Batches = Iterator[tuple[Tensor, Tensor]]


def set_up(device: str, threads: int) -> torch.device:
    """Fix what results and speed depend on beside the code; returns the device to compute on.

    Floating-point sums depend on the number of threads, so it is not left to the machine. Where
    torchrun started several processes, this one joins them.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device = 'cuda': torch finds no CUDA device; use auto or cpu")
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if sys.platform == "linux":
        # glibc gives large blocks back to the system at once and clears them anew for the next
        # step. Keeping them (M_MMAP_THRESHOLD -3, M_TRIM_THRESHOLD -1, mallopt(3)) makes a step
        # about twice as fast; musl has no mallopt.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        mallopt(-3, 2**30)
        mallopt(-1, 2**31 - 1)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if "WORLD_SIZE" in os.environ:
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_gpu else "gloo")
        atexit.register(dist.destroy_process_group)
    return torch.device("cuda" if on_gpu else "cpu")


def process() -> tuple[int, int]:
    """This process's number, from 0, and how many torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(value: Any) -> Any:
    """The first process's `value`, in every process that torchrun started."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def generator(*key: int) -> torch.Generator:
    """An independent stream of random numbers for each `key`."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def autocast(device: torch.device, params: Params) -> torch.autocast:
    """bfloat16 where `params` ask for it and torch holds it safe, on a GPU; the CPU is exact."""
    enabled = params.train.bf16 and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def picture_size(params: Params, mode: str, epoch: int) -> int:
    """Pixels a side of the pictures in `epoch`, from 0, of training in `mode`.

    In mode finetuned they grow evenly, in steps of 16, the stride of the five blocks, up to
    model.image_size: progressive resizing (Tan and Le, "EfficientNetV2", 2021, section 4.2).
    """
    size, last = params.model.image_size, getattr(params.train, mode).epochs - 1
    if mode == "frozen" or epoch >= last:
        return size
    start = params.train.finetuned.first_size
    return min(size, max(16, round((start + (1 - start) * epoch / last) * size / 16) * 16))


def share_of_batch(params: Params) -> int:
    """How many pictures of each batch this process computes."""
    _, processes = process()
    share, left = divmod(params.train.batch_size, processes)
    if left or share < 2:
        raise InputError(
            f"train.batch_size = {params.train.batch_size}: the {processes} processes that "
            "torchrun started must each get equally many pictures, two or more"
        )
    return share


def augmented(data: Split, params: Params, epoch: int) -> Batches:
    """One epoch of (input NCHW, label) batches, each picture augmented anew."""
    draws = generator(params.seed, 0, epoch, process()[0])
    size = picture_size(params, "finetuned", epoch)
    for index in shuffled_batches(len(data.labels), share_of_batch(params), draws):
        images = augment(data.images, index, params.train.crop, draws)
        yield to_input(images, size), data.labels[index.to(data.labels.device)]


def cached_views(backbone: nn.Module, data: Split, params: Params) -> Callable[[int], Batches]:
    """What a frozen backbone makes of augmented pictures, for the head to learn from.

    The backbone never changes, so its output is computed once for each of
    `params.train.frozen.views` differently augmented copies of `data`, which the epochs take in
    turn, and kept as float16. Where that would need more than CACHE_BYTES, each epoch computes
    its own. Returns a function: epoch -> batches of (feature map NCHW, label).
    """
    count, rank = len(data.labels), process()[0]

    @torch.inference_mode()
    def features(index: Tensor, draws: torch.Generator) -> Tensor:
        images = augment(data.images, index, params.train.crop, draws)
        with autocast(images.device, params):
            return backbone(to_input(images, params.model.image_size))

    @functools.cache
    def view(number: int) -> Tensor:
        draws = generator(params.seed, 1, number, rank)
        chunks = torch.arange(count).split(chunk_of(params.model.image_size))
        bar = tqdm(chunks, f"view {number + 1}", leave=False, disable=None)
        return torch.cat([features(index, draws).half() for index in bar])

    def batches(epoch: int) -> Batches:
        draws = generator(params.seed, 0, epoch, rank)
        for index in shuffled_batches(count, share_of_batch(params), draws):
            index = index.to(data.labels.device)
            x = view(epoch % views)[index].float() if cached else features(index, draws)
            yield x, data.labels[index]

    views = min(params.train.frozen.views, params.train.frozen.epochs)
    one = features(torch.zeros(1, dtype=torch.long), generator(0))
    cached = one.numel() * 2 * count * views <= CACHE_BYTES
    return batches


def chunk_of(image_size: int) -> int:
    """How many pictures go through at a time where there is no gradient: it bounds memory."""
    return max(1, CHUNK * 128**2 // max(image_size, 128) ** 2)


def predict(model: nn.Module, images: Tensor, image_size: int) -> Tensor:
    """Logits, float32 (N, classes) on the CPU, for uint8 NHWC `images`; no augmentation."""
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        chunks = tqdm(images.split(chunk_of(image_size)), "predict", leave=False, disable=None)
        return torch.cat([model(to_input(chunk.to(device), image_size)).cpu() for chunk in chunks])


def check_memory(learner: nn.Module, x: Tensor, params: Params) -> None:
    """Raise InputError if a step on a batch of pictures like the one in `x` cannot fit.

    A step needs what autograd keeps for each picture, as much again for what passes between
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
    needed = 2 * sum(kept.values()) * share_of_batch(params) + 16 * parameters(learner)
    on_gpu = x.device.type == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"train.batch_size = {params.train.batch_size}, model.image_size = "
            f"{params.model.image_size}: a step needs about {needed / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} are free; lower one of them"
        )


def optimizer_for(model: nn.Module, mode: str, params: Params) -> torch.optim.Optimizer:
    """AdamW; the head's parameters and the backbone's each at their own peak learning rate.

    As usual, only weights decay, not biases nor BatchNorm's scales and shifts.
    """
    settings = getattr(params.train, mode)
    peaks = {"head": settings.head_lr}
    if mode == "finetuned":
        peaks["backbone"] = settings.backbone_lr
    groups = []
    for part, peak in peaks.items():
        learned = list(model.get_submodule(part).parameters())
        for decay, chosen in (
            (params.train.weight_decay, [p for p in learned if p.ndim > 1]),
            (0.0, [p for p in learned if p.ndim <= 1]),
        ):
            groups.append({"params": chosen, "lr": peak, "weight_decay": decay})
    return torch.optim.AdamW(groups, fused=True)


def slanted_triangle(step: int, steps: int) -> float:
    """The share of its peak that a learning rate has: up in the first WARM_UP steps, then down.

    Howard and Ruder, "Universal Language Model Fine-tuning", 2018, section 3.2.
    """
    peak = max(1, round(WARM_UP * steps))
    return min((step + 1) / peak, (steps - step) / (steps - peak + 1))


def one_epoch(
    name: str,
    learner: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    params: Params,
) -> tuple[float, float]:
    """Take one step on each batch (what `learner` takes, label); returns mean loss and accuracy.

    Raises InputError, in which `name` says which epoch it is, when the loss is not finite.
    """
    learner.train()
    total_loss, right, seen = 0, 0, 0
    for step, (x, labels) in enumerate(batches, 1):
        with autocast(x.device, params):
            logits = learner(x)
            loss = F.cross_entropy(logits, labels, label_smoothing=params.train.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total_loss += loss.detach() * len(labels)
        right += (logits.argmax(1) == labels).sum()
        seen += len(labels)
        if not torch.isfinite(loss):
            rates = " and ".join(f"{group['lr']:.3g}" for group in optimizer.param_groups[::2])
            raise InputError(
                f"{name}, step {step}: the loss is {loss.item()} at learning rates {rates}; "
                "lower them in params.yaml"
            )
    return (total_loss / seen).item(), (right / seen).item()


def train(
    model: nn.Sequential,
    mode: str,
    data: Split,
    held_out: Split,
    params: Params,
    device: torch.device,
    log: Callable[[int, dict[str, float]], None] | None,
    unfinished: Path | None = None,
) -> None:
    """Train `model` (children `backbone` and `head`) in place, in `mode` "frozen" or "finetuned".

    After each epoch, `log` gets its number, from 1, and the mean loss and accuracy in training
    and on `held_out`. The state is then kept in the file `unfinished`, from which a call with the
    same arguments goes on; remove it when the result is safe. Where torchrun started several
    processes, each learns from its share of `data`, and only the first one logs and keeps.

    Raises InputError when a step cannot fit into memory, and when the result is of no use: the
    loss is not finite, an output says the same of every picture, a frozen backbone has changed.
    """
    settings = getattr(params.train, mode)
    rank, processes = process()
    each = len(data.labels) // processes
    epoch_steps = each // share_of_batch(params)
    if not epoch_steps:
        raise InputError(
            f"train.batch_size = {params.train.batch_size}: there are only {len(data.labels)} "
            "training images"
        )
    side = min(data.images.shape[1:3])
    if params.train.crop >= side:
        raise InputError(f"train.crop = {params.train.crop}: the pictures have only {side} pixels")
    smallest = picture_size(params, mode, 0)
    if trace({"backbone": model.backbone}, smallest)["backbone"].shape is None:
        raise InputError(
            f"train.finetuned.first_size = {settings.first_size}: the backbone makes no feature "
            f"map of pictures of {smallest} pixels a side, as the first epoch has them; raise it"
        )
    model.to(device, memory_format=torch.channels_last)
    data = Split(*(t[rank::processes][:each].to(device) for t in data))
    held_out = Split(*(t.to(device) for t in held_out))
    if mode == "frozen":
        freeze(model.backbone)
        before = content_digest(model.backbone.state_dict())
        learner, batches = model.head, cached_views(model.backbone, data, params)
    else:
        learner, batches = model, functools.partial(augmented, data, params)
    one = to_input(data.images[:1], params.model.image_size)
    check_memory(learner, model.backbone.eval()(one) if mode == "frozen" else one, params)
    optimizer = optimizer_for(model, mode, params)

    state = from_first(checkpoint.load(unfinished) if unfinished and rank == 0 else None)
    rows = state["rows"] if state else []
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"{mode}: goes on after epoch {len(rows)}, kept in {unfinished}", flush=True)
    if rank == 0:
        for row in rows:
            log(*row)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        functools.partial(slanted_triangle, steps=epoch_steps * settings.epochs),
        last_epoch=epoch_steps * len(rows) - 1,
    )
    if processes > 1:
        learner = DistributedDataParallel(learner)
    for epoch in range(len(rows), settings.epochs):
        name = f"{mode} epoch {epoch + 1}/{settings.epochs}"
        bar = tqdm(batches(epoch), name, epoch_steps, leave=False, disable=None)
        loss, accuracy = one_epoch(name, learner, bar, optimizer, schedule, params)
        if rank > 0:
            continue
        logits = predict(model, held_out.images, picture_size(params, mode, epoch))
        if dead := (logits == logits[0]).all(0).nonzero().flatten().tolist():
            raise InputError(
                f"{name}: outputs {dead} of the head say the same of every picture; lower the "
                "learning rates in params.yaml"
            )
        labels = held_out.labels.cpu()
        values = {
            "train_loss": loss,
            "train_accuracy": accuracy,
            "validation_loss": F.cross_entropy(logits, labels).item(),
            "validation_accuracy": (logits.argmax(1) == labels).double().mean().item(),
        }
        log(epoch + 1, values)
        rows.append((epoch + 1, values))
        if unfinished:
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows}
            checkpoint.save(unfinished, kept)
    if mode == "frozen" and content_digest(model.backbone.state_dict()) != before:
        raise InputError("the backbone has changed although mode frozen must not change it")
