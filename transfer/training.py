"""The training loop of both modes."""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from transfer.command import InputError
from transfer.data import Split, augment, shuffled_batches, to_input
from transfer.model import freeze
from transfer.params import Params

WARM_UP = 0.2  # share of the steps in which the learning rates climb to their peak
CHUNK = 256  # pictures at a time where there is no gradient; bounds memory, changes no result
CACHE_BYTES = 2 * 2**30  # of cached feature maps; keeps the whole process under 4 GB

Batches = Iterator[tuple[Tensor, Tensor]]


def set_up(device: str, threads: int) -> torch.device:
    """Fix what results and speed depend on beside the code; returns the device to compute on.

    Floating-point sums depend on the number of threads, so it is not left to the machine.
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
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def generator(*key: int) -> torch.Generator:
    """An independent stream of random numbers for each `key`."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def autocast(device: torch.device, params: Params) -> torch.autocast:
    """bfloat16 where `params` ask for it and torch holds it safe, on a GPU; the CPU is exact."""
    enabled = params.train.bf16 and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def augmented(data: Split, params: Params, epoch: int) -> Batches:
    """One epoch of (input NCHW, label) batches, each picture augmented anew."""
    draws = generator(params.seed, 0, epoch)
    for index in shuffled_batches(len(data.labels), params.train.batch_size, draws):
        images = augment(data.images, index, params.train.crop, draws)
        yield to_input(images, params.model.image_size), data.labels[index.to(data.labels.device)]


def cached_views(backbone: nn.Module, data: Split, params: Params) -> Callable[[int], Batches]:
    """What a frozen backbone makes of augmented pictures, for the head to learn from.

    The backbone never changes, so its output is computed once for each of
    `params.train.frozen.views` differently augmented copies of `data`, which the epochs take in
    turn, and kept as float16. Where that would need more than CACHE_BYTES, each epoch computes
    its own. Returns a function: epoch -> batches of (feature map NCHW, label).
    """
    count = len(data.labels)

    @torch.inference_mode()
    def features(index: Tensor, draws: torch.Generator) -> Tensor:
        images = augment(data.images, index, params.train.crop, draws)
        with autocast(images.device, params):
            return backbone(to_input(images, params.model.image_size))

    @functools.cache
    def view(number: int) -> Tensor:
        draws = generator(params.seed, 1, number)
        chunks = torch.arange(count).split(CHUNK)
        bar = tqdm(chunks, f"view {number + 1}", leave=False, disable=None)
        return torch.cat([features(index, draws).half() for index in bar])

    def batches(epoch: int) -> Batches:
        draws = generator(params.seed, 0, epoch)
        for index in shuffled_batches(count, params.train.batch_size, draws):
            index = index.to(data.labels.device)
            x = view(epoch % views)[index].float() if cached else features(index, draws)
            yield x, data.labels[index]

    views = min(params.train.frozen.views, params.train.frozen.epochs)
    one = features(torch.zeros(1, dtype=torch.long), generator(0))
    cached = one.numel() * 2 * count * views <= CACHE_BYTES
    return batches


def predict(model: nn.Module, images: Tensor, image_size: int) -> Tensor:
    """Logits, float32 (N, classes) on the CPU, for uint8 NHWC `images`; no augmentation."""
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        chunks = tqdm(images.split(CHUNK), "predict", leave=False, disable=None)
        return torch.cat([model(to_input(chunk.to(device), image_size)).cpu() for chunk in chunks])


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
    log: Callable[[int, dict[str, float]], None],
) -> None:
    """Train `model` (children `backbone` and `head`) in place, in `mode` "frozen" or "finetuned".

    After each epoch, `log` gets its number, from 1, and the mean loss and accuracy in training
    and on `held_out`. Raises InputError when the loss is no longer finite.
    """
    settings = getattr(params.train, mode)
    model.to(device, memory_format=torch.channels_last)
    data, held_out = (Split(*(t.to(device) for t in split)) for split in (data, held_out))
    if mode == "frozen":
        freeze(model.backbone)
        learner, batches = model.head, cached_views(model.backbone, data, params)
    else:
        learner, batches = model, functools.partial(augmented, data, params)
    optimizer = optimizer_for(model, mode, params)
    epoch_steps = len(data.labels) // params.train.batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, functools.partial(slanted_triangle, steps=epoch_steps * settings.epochs)
    )
    for epoch in range(settings.epochs):
        name = f"{mode} epoch {epoch + 1}/{settings.epochs}"
        bar = tqdm(batches(epoch), name, epoch_steps, leave=False, disable=None)
        loss, accuracy = one_epoch(name, learner, bar, optimizer, schedule, params)
        logits = predict(model, held_out.images, params.model.image_size)
        labels = held_out.labels.cpu()
        log(
            epoch + 1,
            {
                "train_loss": loss,
                "train_accuracy": accuracy,
                "validation_loss": F.cross_entropy(logits, labels).item(),
                "validation_accuracy": (logits.argmax(1) == labels).double().mean().item(),
            },
        )
