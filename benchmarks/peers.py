"""Transfer learning as people usually write it: what the pipeline is compared with.

All train the pipeline's network (the same head, image size and batch size) with AdamW and the
pipeline's peak learning rates of AdamW, which were not tuned for them, on CIFAR-10's 50,000
training images, shifted and flipped at random, one by one, in a DataLoader with two workers. They
compute the backbone in each epoch, also in the frozen mode, in which it is in eval mode. They do
not validate; the pipeline trains on 48,000 images and validates on the other 2,000.

Each function trains for so many epochs of each mode, first frozen, then finetuned, an epoch being
`steps` batches of images drawn at random, calls `tick` after each, and returns the network.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from transfer.common.paths import model_path
from transfer.common.settings import MODES, load_params
from transfer.fetch import assets_dir
from transfer.model import IMAGENET, Network, freeze, load_network

WORKERS = 2
Epochs = dict[str, int]  # of each mode
Tick = Callable[[], None]


def new_network() -> Network:
    """The pretrained backbone and a new head, to be trained."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    network = load_network(load_params().model, 10, model_path("new"), cpu).train()
    return network.to(memory_format=torch.contiguous_format)  # as everybody has it


def cifar10(transform: Callable | None) -> CIFAR10:
    assets = assets_dir()
    return CIFAR10(assets or Path("data"), True, transform, download=not assets)


def loader_of(dataset: CIFAR10, steps: int) -> DataLoader:
    size = load_params().train.shared.batch_size
    sampler = RandomSampler(dataset, num_samples=steps * size)
    return DataLoader(
        dataset, size, sampler=sampler, num_workers=WORKERS, persistent_workers=True
    )  # fmt: skip


def notebook(epochs: Epochs, steps: int, tick: Tick) -> Network:
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
    loader = loader_of(cifar10(transform), steps)
    network = new_network()
    for mode in (mode for mode, count in epochs.items() if count):
        network.train().requires_grad_(True)
        rates = {"head": getattr(params.train, mode).head_lr}
        if mode == "frozen":
            freeze(network.backbone)
        else:
            rates["backbone"] = params.train.finetuned.backbone_lr
        optimizer = torch.optim.AdamW(
            [{"params": network.get_submodule(part).parameters()} for part in rates]
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [*rates.values()], epochs[mode] * steps
        )
        for _ in range(epochs[mode]):
            for x, labels in loader:
                loss = F.cross_entropy(network(x), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                tick()
    return network


def lightning(epochs: Epochs, steps: int, tick: Tick) -> Network:
    """Lightning's Trainer, its BackboneFinetuning, torchvision's transforms v2 on tensors.

    In each mode the learning rates rise for 30 % of the steps, and then fall to 0.
    """
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import BackboneFinetuning

    params = load_params()
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

    class Classifier(pl.LightningModule):
        def __init__(self, network: Network):
            super().__init__()
            self.backbone, self.head = network.backbone, network.head

        def on_train_epoch_start(self):
            self.mode = MODES[self.current_epoch >= epochs["frozen"]]
            self.backbone.train(self.mode == "finetuned")

        def training_step(self, batch, _):
            x, labels = batch
            return F.cross_entropy(self.head(self.backbone(x)), labels)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.head.parameters(), params.train.frozen.head_lr)

        def on_before_optimizer_step(self, optimizer):
            # torch's schedules refuse the group of parameters that BackboneFinetuning adds.
            settings = getattr(params.train, self.mode)
            peaks = [settings.head_lr, params.train.finetuned.backbone_lr]
            done = self.global_step - steps * epochs["frozen"] * (self.mode == "finetuned")
            share = (done + 1) / (steps * epochs[self.mode])
            for group, peak in zip(optimizer.param_groups, peaks, strict=False):
                group["lr"] = peak * min(share / 0.3, (1 - share) / 0.7)

    class Finetuning(BackboneFinetuning):
        def freeze_before_training(self, module):
            self.freeze(module.backbone, train_bn=False)  # BatchNorm also: no backward pass

    class Ticks(pl.Callback):
        def on_train_batch_end(self, *_):
            tick()

    network = new_network()
    callbacks: list[pl.Callback] = [Ticks()]
    if epochs["finetuned"]:
        callbacks.append(Finetuning(unfreeze_backbone_at_epoch=epochs["frozen"]))
    else:
        freeze(network.backbone)
    trainer = pl.Trainer(
        max_epochs=sum(epochs.values()), accelerator="cpu", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # it asks for more workers than there are cores
        trainer.fit(Classifier(network), loader_of(cifar10(transform), steps))
    return network


def fastai(epochs: Epochs, steps: int, tick: Tick) -> Network:
    """fastai's Learner and its `fine_tune`; the images of an epoch are drawn once, for both modes.

    Augmented by flips alone: fastai shifts a larger image, which would cost it time. `fine_tune`
    has one learning rate for both modes, halved in the second: so 4e-3 when frozen, not 5e-3.
    """
    from fastai.callback.schedule import Learner
    from fastai.data.block import CategoryBlock, DataBlock
    from fastai.learner import Callback
    from fastai.learner import params as parameters
    from fastai.vision.augment import Flip, Resize
    from fastai.vision.core import PILImage, imagenet_stats
    from fastai.vision.data import ImageBlock, Normalize

    params = load_params()
    settings, batch_size = params.train.finetuned, params.train.shared.batch_size
    dataset = cifar10(None)
    block = DataBlock(
        (ImageBlock, CategoryBlock(vocab=dataset.classes)),
        get_x=lambda i: PILImage.create(dataset.data[i]),
        get_y=lambda i: dataset.classes[dataset.targets[i]],
        splitter=lambda items: (list(range(len(items))), [0]),
        item_tfms=Resize(params.model.image_size),
        batch_tfms=[Flip(), Normalize.from_stats(*imagenet_stats)],
    )
    network = new_network()  # sets the seed
    loaders = block.dataloaders(
        torch.randperm(len(dataset))[: steps * batch_size].tolist(), bs=batch_size,
        num_workers=WORKERS, device=torch.device("cpu"),
    )  # fmt: skip

    class Ticks(Callback):
        def after_batch(self):
            if self.training:
                tick()

    learner = Learner(
        loaders, network, loss_func=nn.CrossEntropyLoss(), cbs=Ticks(), train_bn=False,
        splitter=lambda network: [parameters(network.backbone), parameters(network.head)],
    )  # fmt: skip
    with learner.no_bar(), learner.no_logging():
        if all(epochs.values()):
            learner.fine_tune(
                epochs["finetuned"], 2 * settings.head_lr, epochs["frozen"],  # it takes half of it
                lr_mult=settings.head_lr / settings.backbone_lr,
            )  # fmt: skip
        elif epochs["frozen"]:
            learner.freeze()
            learner.fit_one_cycle(epochs["frozen"], params.train.frozen.head_lr)
        else:
            rates = slice(settings.backbone_lr, settings.head_lr)
            learner.fit_one_cycle(epochs["finetuned"], rates)
    return network


PEERS = {"notebook": notebook, "Lightning": lightning, "fastai": fastai}
LIBRARIES = {"Lightning": "pytorch_lightning", "fastai": "fastai.vision.all"}  # imported untimed
