"""The two modes of training: what learns in an epoch, on which batches, at which image size."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from transfer.common.dataset import Split
from transfer.common.settings import Params
from transfer.inference import autocast, chunk_size, to_input
from transfer.model import Network, folded, freeze
from transfer.training.processes import batch_size_per_process, data_of_process, process_count, rank

CACHE_BYTES = 2 * 2**30  # of cached feature maps; the whole process then needs about 3 GB

EPOCHS, VIEWS, LAYERS = range(3)  # what the streams of random numbers are for

Batches = Iterable[tuple[Tensor, Tensor]]  # what the learner takes, and labels, int64 (N,)


class Mode(ABC):
    """What both modes share. `network` and `data`, the images of this process, are on one device.

    An epoch has `steps` batches of `batch_size` images. Images that do not fill a batch are left
    out; few images are repeated until there are train.shared.min_steps batches.
    """

    name: str
    # Peaks of the learning rates: of AdamW for each part that is trained, and of Muon.
    peak_rates: dict[str, float]

    def __init__(self, network: Network, data: Split, params: Params):
        self.network, self.data, self.params = network, data, params
        self.settings = getattr(params.train, self.name)
        self.count = len(data.labels)
        self.batch_size = min(batch_size_per_process(params), self.count)
        self.steps = max(self.count // self.batch_size, params.train.shared.min_steps)
        example = self.to_input(data.images[:1], params.model.image_size)
        # Faster, with the same parameters: what trains one trains the other.
        self.folded_backbone = folded(network.backbone, example)

    @abstractmethod
    def learner(self, epoch: int) -> nn.Module:
        """The module that is trained in `epoch`, from 0, in training mode: inputs -> logits."""

    @abstractmethod
    def inputs(self, epoch: int, index: Tensor, generator: torch.Generator) -> Tensor:
        """What the learner takes, made of the images at `index`, augmented at random."""

    def image_size(self, epoch: int) -> int:
        """Pixels on each side of the images in `epoch`, from 0."""
        return self.params.model.image_size

    def batches(self, epoch: int) -> Batches:
        """The batches of `epoch`, from 0: inputs of the learner, and labels."""
        generator = random_stream(self.params.seed, EPOCHS, epoch, rank())
        for index in shuffled_batches(self.count, self.steps, self.batch_size, generator):
            labels = self.data.labels[index.to(self.data.labels.device)]
            yield self.inputs(epoch, index, generator), labels

    def augment(self, index: Tensor, generator: torch.Generator, image_size: int) -> Tensor:
        """The images at `index`, augmented at random, as the input of a network."""
        max_shift = self.params.train.shared.max_shift
        images = shift_and_flip(self.data.images, index, max_shift, generator)
        return self.to_input(images, image_size)

    def to_input(self, images: Tensor, image_size: int) -> Tensor:
        return to_input(images, image_size, self.network.mean, self.network.std)


class Frozen(Mode):
    """Feature extraction: only the head learns, on the feature maps that the backbone makes.

    The backbone never changes, so its output is computed once for each of train.frozen.views
    differently augmented copies of the images ("views"), which the epochs use in turn, and kept as
    float16. Where these would need more than CACHE_BYTES, each epoch computes its own.
    """

    name = "frozen"

    def __init__(self, network: Network, data: Split, params: Params):
        super().__init__(network, data, params)
        self.peak_rates = {"muon": self.settings.muon_lr, "head": self.settings.head_lr}
        freeze(network.backbone)
        self.head = in_all_processes(network.head)
        self.views = min(self.settings.views, self.settings.epochs)
        one = self.features(torch.zeros(1, dtype=torch.long), random_stream(0)).half()
        self.view_shape = (self.count, *one.shape[1:])
        self.cached = one.nbytes * self.count * self.views <= CACHE_BYTES
        self.view = functools.cache(self.extract)

    def learner(self, epoch: int) -> nn.Module:
        return self.head.train()

    def inputs(self, epoch: int, index: Tensor, generator: torch.Generator) -> Tensor:
        if not self.cached:
            return self.features(index, generator)
        view = self.view(epoch % self.views)
        return view[index.to(view.device)].float()

    def extract(self, number: int) -> Tensor:
        """View `number`: the feature maps, float16 NCHW, of all images."""
        generator = random_stream(self.params.seed, VIEWS, number, rank())
        device, layout = self.data.images.device, torch.channels_last
        view = torch.empty(self.view_shape, dtype=torch.half, device=device, memory_format=layout)
        chunks = torch.arange(self.count).split(chunk_size(self.params.model.image_size))
        for index in tqdm(chunks, f"view {number + 1}", leave=False, disable=None):
            view[index.to(device)] = self.features(index, generator).half()
        return view

    @torch.no_grad()  # not inference mode, whose tensors cannot enter the training of the head
    def features(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """The feature maps, NCHW, of the images at `index`, augmented at random."""
        x = self.augment(index, generator, self.params.model.image_size)
        with autocast(x.device, self.params.train.bf16):
            return self.folded_backbone(x)


class Finetuned(Mode):
    """Fine-tuning: head and backbone learn, on images that are augmented anew in each epoch.

    In the first train.finetuned.batch_norm_until of the epochs, the backbone's BatchNorm uses and
    updates batch statistics; then its running statistics are fixed. It is then folded into the
    convolutions, where that is possible: a step is faster, and the trained function is the one that
    is evaluated.
    """

    name = "finetuned"

    def __init__(self, network: Network, data: Split, params: Params):
        super().__init__(network, data, params)
        self.peak_rates = {
            "muon": self.settings.muon_lr,
            "head": self.settings.head_lr,
            "backbone": self.settings.backbone_lr,
        }
        self.first_fixed = round(self.settings.batch_norm_until * self.settings.epochs)
        self.with_batch_statistics = in_all_processes(network)
        with_folding = nn.Sequential(self.folded_backbone, network.head)
        self.with_fixed_statistics = in_all_processes(with_folding)

    def learner(self, epoch: int) -> nn.Module:
        if epoch < self.first_fixed:
            return self.with_batch_statistics.train()
        learner = self.with_fixed_statistics.train()
        for module in self.folded_backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # those that could not be folded
        return learner

    def inputs(self, epoch: int, index: Tensor, generator: torch.Generator) -> Tensor:
        return self.augment(index, generator, self.image_size(epoch))

    def image_size(self, epoch: int) -> int:
        """Images grow evenly, in steps of 16, the default's stride, to model.image_size:
        progressive resizing (Tan and Le, "EfficientNetV2", 2021, section 4.2).
        """
        size, start = self.params.model.image_size, self.settings.initial_scale
        last = self.settings.epochs - 1
        if epoch >= last:
            return size
        scale = start + (1 - start) * epoch / last
        return min(size, max(16, round(scale * size / 16) * 16))


def make_mode(
    name: str, network: Network, data: Split, params: Params, device: torch.device
) -> Mode:
    """The mode `name`, frozen or finetuned, for `network`, which is moved to `device`, and for this
    process's part of `data`.
    """
    # On a CPU, convolutions are 2 to 4 times as fast with channels last (NHWC) in memory.
    network.to(device).to(memory_format=torch.channels_last)
    part = Split(*(tensor.to(device) for tensor in data_of_process(data, params)))
    return {mode.name: mode for mode in (Frozen, Finetuned)}[name](network, part, params)


def in_all_processes(module: nn.Module) -> nn.Module:
    """`module`; if torchrun started several processes, its gradients are averaged over them."""
    return DistributedDataParallel(module) if process_count() > 1 else module


def random_stream(*key: int) -> torch.Generator:
    """A stream of random numbers, independent of that of any other `key` of the same length."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def shuffled_batches(
    count: int, steps: int, size: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """`steps` batches of `size` indices, int64, 0 to `count` - 1 in random order.

    Where they are more than `count` in all, each index is repeated, in a new order each time.
    """
    rounds = -(-steps * size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return order[: steps * size].split(size)


def shift_and_flip(
    images: Tensor, index: Tensor, max_shift: int, generator: torch.Generator
) -> Tensor:
    """The images at `index`, each shifted by up to `max_shift` pixels, half of them flipped.

    `images` is uint8 NHWC on any device; `generator` draws on the CPU, so the draws are the same
    on every device. What a shift uncovers is filled by mirroring at the border. Returns a new
    uint8 NHWC tensor.
    """
    height, width = images.shape[1:3]

    def source(size: int) -> Tensor:
        shift = torch.randint(-max_shift, max_shift + 1, (len(index), 1), generator=generator)
        position = (torch.arange(size) + shift).abs()  # mirrored at the first pixel ...
        return (size - 1) - ((size - 1) - position).abs()  # ... and at the last

    rows, columns = source(height), source(width)
    flip = torch.rand((len(index), 1), generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    # One gather moves each pixel once; a crop and a flip of each image would be many small copies.
    gather = (index[:, None, None], rows[:, :, None], columns[:, None, :])
    return images[tuple(i.to(images.device) for i in gather)]
