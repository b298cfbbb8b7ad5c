"""Transfer learning as people usually write it: what the pipeline is compared with.

All train the pipeline's network (the same head, image size and batch size) with AdamW and the same
peak learning rates on CIFAR-10's training images, shifted and flipped at random, one by one, in a
DataLoader with two workers, and compute the backbone in each epoch, also in the frozen mode.

Each function trains for `steps` batches, in `mode` frozen or finetuned, calls `tick` after each,
and returns the network.
"""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from transfer.common.paths import model_path
from transfer.common.settings import load_params
from transfer.fetch import assets_dir
from transfer.model import IMAGENET, Network, freeze, load_network

WORKERS = 2
Tick = Callable[[], None]


def new_network(mode: str) -> Network:
    """The pretrained backbone, frozen in mode frozen, and a new head."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    network = load_network(load_params().model, 10, model_path("new"), cpu).train()
    network.to(memory_format=torch.contiguous_format)  # as everybody has it
    if mode == "frozen":
        freeze(network.backbone)
    return network


def cifar10(transform: Callable | None) -> CIFAR10:
    assets = assets_dir()
    return CIFAR10(assets or Path("data"), True, transform, download=not assets)


def loader_of(dataset: CIFAR10, persistent: bool = False) -> DataLoader:
    size = load_params().train.shared.batch_size
    return DataLoader(
        dataset, size, shuffle=True, num_workers=WORKERS, drop_last=True,
        persistent_workers=persistent,
    )  # fmt: skip


def notebook(mode: str, steps: int, tick: Tick) -> Network:
    """The usual notebook: PIL images, a loop over the batches, one cycle of the learning rates."""
    params = load_params()
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, params.train.shared.max_shift, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            transforms.Resize(params.model.image_size),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET.values()),
        ]
    )
    loader = loader_of(cifar10(transform))
    network = new_network(mode)
    settings = params.train.finetuned
    rates = {"head": settings.head_lr} | (
        {"backbone": settings.backbone_lr} if mode == "finetuned" else {}
    )
    groups = [{"params": network.get_submodule(part).parameters()} for part in rates]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [*rates.values()], steps)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for x, labels in itertools.islice(batches, steps):
        loss = F.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tick()
    return network


def lightning(mode: str, steps: int, tick: Tick) -> Network:
    """Lightning's Trainer, its BackboneFinetuning, torchvision's transforms v2 on tensors.

    As that callback is meant, the head is first trained alone, here for an epoch if there are more.
    """
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import BackboneFinetuning

    params = load_params()
    settings = params.train.finetuned
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomCrop(32, params.train.shared.max_shift, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
            v2.Resize(params.model.image_size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*IMAGENET.values()),
        ]
    )
    loader = loader_of(cifar10(transform), persistent=True)

    class Classifier(pl.LightningModule):
        def __init__(self, network: Network):
            super().__init__()
            self.backbone, self.head = network.backbone, network.head

        def training_step(self, batch, _):
            x, labels = batch
            return F.cross_entropy(self.head(self.backbone(x)), labels)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.head.parameters(), settings.head_lr)

        def on_before_optimizer_step(self, optimizer):
            # torch's schedules refuse the group of parameters that BackboneFinetuning adds.
            peaks = (settings.head_lr, settings.backbone_lr)
            for group, peak in zip(optimizer.param_groups, peaks, strict=False):
                group["lr"] = peak * (1 - self.global_step / steps)

    class Ticks(pl.Callback):
        def on_train_batch_end(self, *_):
            tick()

    callbacks: list[pl.Callback] = [Ticks()]
    if mode == "finetuned":
        callbacks.append(
            BackboneFinetuning(
                unfreeze_backbone_at_epoch=min(1, steps // len(loader)),
                backbone_initial_ratio_lr=settings.backbone_lr / settings.head_lr,
            )
        )
    network = new_network(mode)
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # it asks for more workers than there are cores
        trainer.fit(Classifier(network), loader)
    return network


def fastai(mode: str, steps: int, tick: Tick) -> Network:
    """fastai's Learner and one-cycle training, in whole epochs, of fewer images to end at `steps`.

    Augmented by flips alone: fastai shifts a larger image, which would cost it time.
    """
    from fastai.callback.schedule import Learner
    from fastai.data.block import CategoryBlock, DataBlock
    from fastai.learner import Callback
    from fastai.learner import params as parameters
    from fastai.vision.augment import Flip, Resize
    from fastai.vision.core import PILImage, imagenet_stats
    from fastai.vision.data import ImageBlock, Normalize

    params = load_params()
    settings = params.train.finetuned
    dataset, batch_size = cifar10(None), params.train.shared.batch_size
    epochs = -(-steps * batch_size // len(dataset))
    count = steps * batch_size // epochs
    block = DataBlock(
        (ImageBlock, CategoryBlock(vocab=dataset.classes)),
        get_x=lambda i: PILImage.create(dataset.data[i]),
        get_y=lambda i: dataset.classes[dataset.targets[i]],
        splitter=lambda items: (list(range(len(items))), [0]),
        item_tfms=Resize(params.model.image_size),
        batch_tfms=[Flip(), Normalize.from_stats(*imagenet_stats)],
    )
    network = new_network(mode)  # sets the seed
    loaders = block.dataloaders(
        torch.randperm(len(dataset))[:count].tolist(), bs=batch_size, num_workers=WORKERS,
        device=torch.device("cpu"),
    )  # fmt: skip

    class Ticks(Callback):
        def after_batch(self):
            if self.training:
                tick()

    learner = Learner(
        loaders, network, loss_func=nn.CrossEntropyLoss(), cbs=Ticks(), train_bn=False,
        splitter=lambda network: [parameters(network.backbone), parameters(network.head)],
    )  # fmt: skip
    if mode == "frozen":
        learner.freeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(epochs, slice(settings.backbone_lr, settings.head_lr))
    return network


PEERS = {"notebook": notebook, "Lightning": lightning, "fastai": fastai}
