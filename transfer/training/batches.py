"""Batches of augmented images, or of the feature maps that a frozen backbone makes of them."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from transfer.common.arrays import Split
from transfer.common.params import Params
from transfer.inference import chunk_size, to_input
from transfer.training.processes import process, share_of_batch

CACHE_BYTES = 2 * 2**30  # of cached feature maps; keeps the whole process under 4 GB

Batches = Iterator[tuple[Tensor, Tensor]]


def random_stream(*key: int) -> torch.Generator:
    """An independent stream of random numbers for each `key`."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def batches_of_epoch(count: int, params: Params) -> tuple[int, int]:
    """How many batches an epoch of `count` images has, and how many images each of them.

    Images that do not fill a batch are left out. Few images are passed over several times, for
    train.shared.min_steps batches; a batch has at most all images.
    """
    size = min(share_of_batch(params), count)
    return max(count // size, params.train.shared.min_steps), size


def shuffled_batches(count: int, params: Params, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The batches of an epoch: indices 0 to `count` - 1, in a new random order in each pass."""
    steps, size = batches_of_epoch(count, params)
    passes = -(-steps * size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    return order[: steps * size].split(size)


def augment(images: Tensor, index: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """The images at `index`, each shifted by up to `max_shift` pixels, half of them flipped.

    `images` is uint8 NHWC on any device; `generator` draws on the CPU, so the draws are the same
    on every device. What a shift uncovers is filled by mirroring at the border. One gather does
    it all. Returns a new uint8 NHWC tensor.
    """
    height, width = images.shape[1:3]

    def source(size: int) -> Tensor:
        shift = torch.randint(-max_shift, max_shift + 1, (len(index), 1), generator=generator)
        position = (torch.arange(size) + shift).abs()
        return (size - 1) - ((size - 1) - position).abs()

    rows, columns = source(height), source(width)
    flip = torch.rand((len(index), 1), generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    gather = (index[:, None, None], rows[:, :, None], columns[:, None, :])
    return images[tuple(i.to(images.device) for i in gather)]


def image_size_in(epoch: int, mode: str, params: Params) -> int:
    """Pixels a side of the training images in `epoch`, from 0, of `mode`.

    In mode finetuned they grow evenly, in steps of 16, the stride of the five blocks, up to
    model.image_size: progressive resizing (Tan and Le, "EfficientNetV2", 2021, section 4.2).
    """
    size, settings = params.model.image_size, params.train.finetuned
    if mode == "frozen" or epoch >= settings.epochs - 1:
        return size
    start = settings.initial_scale
    scale = start + (1 - start) * epoch / (settings.epochs - 1)
    return min(size, max(16, round(scale * size / 16) * 16))


def augmented(data: Split, params: Params, epoch: int) -> Batches:
    """One epoch of (input NCHW, labels) for fine-tuning, each image augmented anew."""
    generator = random_stream(params.seed, 0, epoch, process()[0])
    size = image_size_in(epoch, "finetuned", params)
    for index in shuffled_batches(len(data.labels), params, generator):
        images = augment(data.images, index, params.train.shared.max_shift, generator)
        yield to_input(images, size), data.labels[index.to(data.labels.device)]


def autocast(device: torch.device, params: Params) -> torch.autocast:
    """bfloat16 where `params` ask for it and torch holds it safe; the CPU always has float32."""
    enabled = params.train.bf16 and device.type != "cpu"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def cached_features(backbone: nn.Module, data: Split, params: Params) -> Callable[[int], Batches]:
    """Feature extraction: what a frozen backbone makes of augmented images, to train a head on.

    The backbone never changes, so its output is computed once for each of
    `params.train.frozen.views` differently augmented copies of `data`, which the epochs take in
    turn, and kept as float16. Where that would need more than CACHE_BYTES, each epoch computes
    its own. Returns a function: epoch -> batches of (feature map NCHW, labels).
    """
    count, rank = len(data.labels), process()[0]

    @torch.no_grad()  # not inference mode, whose tensors cannot enter the training of the head
    def features(index: Tensor, generator: torch.Generator) -> Tensor:
        images = augment(data.images, index, params.train.shared.max_shift, generator)
        with autocast(images.device, params):
            return backbone(to_input(images, params.model.image_size))

    @functools.cache
    def view(number: int) -> Tensor:
        generator = random_stream(params.seed, 1, number, rank)
        chunks = torch.arange(count).split(chunk_size(params.model.image_size))
        bar = tqdm(chunks, f"view {number + 1}", leave=False, disable=None)
        return torch.cat([features(index, generator).half() for index in bar])

    def batches(epoch: int) -> Batches:
        generator = random_stream(params.seed, 0, epoch, rank)
        for index in shuffled_batches(count, params, generator):
            index = index.to(data.labels.device)
            x = view(epoch % views)[index].float() if cached else features(index, generator)
            yield x, data.labels[index]

    views = min(params.train.frozen.views, params.train.frozen.epochs)
    one = features(torch.zeros(1, dtype=torch.long), random_stream(0))
    cached = one.numel() * 2 * count * views <= CACHE_BYTES
    return batches
