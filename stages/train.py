"""Stage `train@MODE`: train the head and, in mode finetuned, also the backbone.

python -m stages.train frozen
torchrun --standalone --nproc-per-node=2 -m stages.train frozen   # data-parallel
"""

import hashlib
import io
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from transfer.data import Split, balanced, load_split, shift_and_flip, stratified, to_input
from transfer.model import Network, chunk_size, folded, freeze, load, predict, save
from transfer.optim import make_optimizers
from transfer.run import (
    METRICS,
    PREPARED,
    PROJECT,
    machine,
    model_path,
    run_stage,
    set_up_torch,
    write_csv,
)
from transfer.settings import MODES, FinetunedSettings, InputError, Params, load_params

CACHE_BYTES = 2 * 2**30  # of feature maps on disk
Extract = Callable[[Tensor, torch.Generator], Tensor]
EPOCHS, VIEWS, LAYERS = range(3)  # what the streams of random numbers are for


def main(mode: str) -> None:
    params = load_params()
    shared, seed = params.train.shared, params.seed
    device = set_up_torch(params.train.device, params.train.threads)
    rank, world_size = init_distributed(device)

    # Hold out validation images, and take as many others as asked for; the test split is not read.
    start = model_path(params.train.finetuned.start if mode == "finetuned" else "new")
    network = load(start, device)
    data = load_split("train")
    training, validation = stratified(
        data.labels, shared.validation_share, network.classes, seed,
        "train.shared.validation_share", data.keys,
    )  # fmt: skip
    if shared.images:
        training = balanced(data.labels, training, shared.images, seed)

    # Fine-tuning starts where feature extraction ended: the first gradients of a new head are noise
    # and would distort the backbone (Kumar et al., "Fine-Tuning can Distort Pretrained Features and
    # Underperform Out-of-Distribution", 2022).
    network.temperature.fill_(1)  # training needs undivided logits
    checkpoint = checkpoint_path(mode, start, device, world_size)
    rows = train(mode, network, data, training, validation, params, checkpoint)

    if rank == 0:
        logits = predict(network, data.images, validation)
        network.temperature.fill_(fit_temperature(logits, data.labels[validation]))
        network.pixels = data.images.shape[1]
        write_csv(METRICS / "curves" / f"{mode}.csv", rows)
        save(network, model_path(mode))
        checkpoint.unlink(missing_ok=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def train(
    mode: str, network: Network, data: Split, training: Tensor, validation: Tensor, params: Params,
    checkpoint: Path | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Train `network` in place on the images of `data` at `training`, int64 (n,).

    Prints and returns a row for each epoch: its number, from 1, and the mean loss in nats and the
    accuracy, each on the training images and on the images at `validation`.

    The state is kept in the file `checkpoint` after each epoch, and a call with the same arguments
    resumes from it. The caller deletes it when the model is saved. Raises InputError if the
    settings do not fit the images, or if the loss is not finite.
    """
    network.requires_grad_(True)
    frozen, shared = mode == "frozen", params.train.shared
    settings = params.train.frozen if frozen else params.train.finetuned
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    device, seed = network.mean.device, params.seed

    # Each process trains on its shard of the images and on its share of each batch. An epoch leaves
    # out the last incomplete batch; few images are repeated until there are min_steps batches.
    count = len(training) // world_size
    shard = training[rank::world_size][:count]
    images, labels = data.images.to(device), data.labels[shard].to(device)
    batch_size = min(shared.batch_size // world_size, count)
    if batch_size < 2 or shared.batch_size % world_size:  # BatchNorm needs two images
        raise InputError(
            f"train.shared.batch_size = {shared.batch_size}, train.shared.images = {shared.images}:"
            f" each of {world_size} processes needs equally many images of a batch, two or more"
        )
    steps = max(count // batch_size, shared.min_steps)

    def augment(index: Tensor, size: int, generator: torch.Generator) -> Tensor:
        moved = shift_and_flip(images, shard[index], shared.max_shift, shared.flip, generator)
        return to_input(moved, size, network.mean, network.std)

    def ddp(module: nn.Module) -> nn.Module:  # averages the gradients of all processes
        return DistributedDataParallel(module) if world_size > 1 else module

    # BatchNorm with fixed statistics can be folded into the convolutions before it: a step is
    # faster, and what is trained is what is evaluated.
    full_size = network.settings.image_size
    backbone = folded(network.backbone, to_input(images[:1], full_size, network.mean, network.std))
    if frozen:
        freeze(network.backbone)

        @torch.no_grad()  # not inference mode, whose tensors cannot enter the training of the head
        def extract(index: Tensor, generator: torch.Generator) -> Tensor:
            return backbone(augment(index, full_size, generator))

        views = range(min(params.train.frozen.views, settings.epochs))
        streams = [random_stream(seed, VIEWS, view, rank) for view in views]
        features = FeatureCache(extract, torch.arange(count).split(chunk_size(full_size)), streams)
        first_fixed, learner = 0, ddp(network.head)
    else:
        network.backbone.channels(growing_size(0, full_size, params.train.finetuned))  # may refuse
        first_fixed = round(params.train.finetuned.batch_norm_until * settings.epochs)
        learner = ddp(nn.Sequential(backbone, network.head))
    unfolded = ddp(network) if first_fixed else learner

    # scikit-learn's formula: every class has the same share in the loss.
    counts = data.labels[training].bincount(minlength=len(network.classes))
    weights = (len(training) / (len(counts) * counts)).to(device) if shared.class_weights else None
    optimizers = make_optimizers(network, settings, shared.warm_up, steps * settings.epochs)
    rows: list[dict[str, float]] = []
    if checkpoint and (state := read_checkpoint(checkpoint)):
        rows = state["rows"]
        for part, values in zip([network, *optimizers], state["parts"], strict=True):
            part.load_state_dict(values)
        if rank == 0:
            print(f"resuming after epoch {len(rows)}, kept in {checkpoint}", flush=True)
            for row in rows:
                print_row(mode, row)

    for epoch in range(len(rows), settings.epochs):
        name = f"{mode} epoch {epoch + 1}/{settings.epochs}"
        size = full_size if frozen else growing_size(epoch, full_size, params.train.finetuned)
        # Every epoch has random numbers of its own, so that resuming changes nothing; those of
        # torch's global generator are for layers that draw, such as stochastic depth.
        generator = random_stream(seed, EPOCHS, epoch, rank)
        torch.manual_seed(random_stream(seed, LAYERS, epoch, rank).initial_seed())
        learning = (learner if epoch >= first_fixed else unfolded).train()
        if epoch >= first_fixed:
            for module in backbone.modules():  # those that could not be folded
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

        # Sums stay on the device: to read them in each step would make the CPU wait for a GPU.
        total_loss, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        batches = shuffled_batches(count, steps, batch_size, generator)
        for index in tqdm(batches, name, leave=False, disable=None):
            x = features(epoch, index, generator) if frozen else augment(index, size, generator)
            y = labels[index.to(device)]
            logits = learning(x)
            loss = F.cross_entropy(logits, y, weights, label_smoothing=shared.label_smoothing)
            learning.zero_grad()
            loss.backward()
            for part in optimizers:
                part.step()
            total_loss += loss.detach()
            correct += (logits.argmax(1) == y).sum()

        if rank > 0:  # the first process validates, prints and keeps
            continue
        # At the epoch's image size: the head's BatchNorm has statistics of features at this size.
        logits, y = predict(network, data.images, validation, size), data.labels[validation]
        val_metrics = {
            "validation_loss": F.cross_entropy(logits, y).item(),
            "validation_accuracy": (logits.argmax(1) == y).double().mean().item(),
        }
        train_metrics = {
            "train_loss": float(total_loss / steps),
            "train_accuracy": float(correct / (steps * batch_size)),
        }
        if not math.isfinite(train_metrics["train_loss"] + val_metrics["validation_loss"]):
            raise InputError(f"{name}: the loss is not finite; lower the rates of train.{mode}")
        rows.append({"epoch": epoch + 1} | train_metrics | val_metrics)
        print_row(mode, rows[-1])
        if checkpoint:
            parts = [part.state_dict() for part in (network, *optimizers)]
            write_checkpoint(checkpoint, {"rows": rows, "parts": parts})
    return rows


class FeatureCache:
    """The feature maps that a frozen backbone makes of augmented images.

    The backbone never changes, so its output is computed once for each of a few differently
    augmented copies of the images ("views"), which the epochs use in turn. They are float16 in
    temporary files, which the system keeps in memory as far as there is room. If the views need
    more than CACHE_BYTES, the maps of each batch are computed anew.
    """

    def __init__(self, extract: Extract, chunks: Sequence[Tensor], streams: list[torch.Generator]):
        self.extract, self.chunks, self.streams = extract, chunks, streams
        self.count = sum(map(len, chunks))
        self.one = extract(chunks[0][:1], random_stream(0)).half()
        self.fits = self.one.nbytes * self.count * len(streams) <= CACHE_BYTES
        self.views: dict[int, Tensor] = {}

    def __call__(self, epoch: int, index: Tensor, generator: torch.Generator) -> Tensor:
        """The feature maps, float32 NCHW, of the images at `index`, int64 (n,)."""
        if not self.fits:
            return self.extract(index, generator)
        number = epoch % len(self.streams)
        if number not in self.views:
            self.views[number] = self.view(number)
        maps = self.views[number]
        return maps[index.to(maps.device)].float()

    def view(self, number: int) -> Tensor:
        """The feature maps, float16 NCHW, of all images in view `number`."""
        PREPARED.parent.mkdir(exist_ok=True)
        file = tempfile.TemporaryFile(dir=PREPARED.parent)  # noqa: SIM115  as long as it is mapped
        for index in tqdm(self.chunks, f"view {number + 1}", leave=False, disable=None):
            maps = self.extract(index, self.streams[number]).half().permute(0, 2, 3, 1)
            file.write(maps.contiguous().cpu().numpy().data)
        file.flush()
        channels, *sides = self.one.shape[1:]
        mapped = np.memmap(file, np.float16, "c", shape=(self.count, *sides, channels))
        return torch.from_numpy(mapped).permute(0, 3, 1, 2).to(self.one.device)


def growing_size(epoch: int, size: int, settings: FinetunedSettings) -> int:
    """Pixels a side of the images in `epoch`, from 0: they grow evenly, in steps of 16, the stride
    of five blocks, to `size` (Tan and Le, "EfficientNetV2", 2021, section 4.2).
    """
    last = settings.epochs - 1
    if epoch >= last:
        return size
    scale = settings.initial_scale + (1 - settings.initial_scale) * epoch / last
    return min(size, max(16, round(scale * size / 16) * 16))


def shuffled_batches(
    count: int, steps: int, size: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """`steps` batches of `size` indices, int64, 0 to `count` - 1 in random order.

    If they are more than `count` in all, every index is used once before any is used again.
    """
    rounds = -(-steps * size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return order[: steps * size].split(size)


def random_stream(*key: int) -> torch.Generator:
    """A stream of random numbers, independent of that of any other `key` of the same length."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature, from 0.05 to 20, that minimises the cross-entropy of `logits` divided by it.
    If the images do not determine it, a line says so, and it is 1.

    `logits` is (N, classes), `labels` int64 (N,). Guo et al., "On Calibration of Modern Neural
    Networks", 2017, section 4.2.
    """
    exact, bounds = logits.double(), (-3, 3)  # of its logarithm

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(exact / np.exp(log_temperature), labels).item()

    found = float(minimize_scalar(loss, bounds=bounds, method="bounded").x)
    # If all predictions are correct, the cross-entropy falls as long as the temperature does.
    if torch.equal(logits.argmax(1), labels) or abs(found) > max(bounds) - 0.01:
        print(f"{len(logits)} validation images do not determine the temperature; it stays 1")
        return 1.0
    return float(np.exp(found))


def checkpoint_path(mode: str, start: Path, device: torch.device, world_size: int) -> Path:
    """Its name hashes all that the result depends on, so a stale checkpoint is never resumed.

    It lies in the project, so that it outlives the copies in which DVC runs experiments.
    """
    digest = hashlib.sha256(f"{mode} {device} {world_size} {machine()}".encode())
    code = [Path(__file__), *sorted(Path(__file__).parents[1].glob("transfer/*.py"))]
    for path in (Path("params.yaml"), start, *sorted(PREPARED.iterdir()), *code):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return PROJECT / ".checkpoints" / f"{mode}-{digest.hexdigest()[:16]}"


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    content, partial = io.BytesIO(), path.with_suffix(".partial")
    torch.save(state, content)
    partial.write_bytes(content.getvalue())  # OSError if the disk is full; torch has its own errors
    os.replace(partial, path)  # a kill leaves the old checkpoint or the new one, nothing between


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The first process's checkpoint, in every process; None if there is none."""
    state: list[Any] = [None]
    if path.exists():
        state = [torch.load(path, map_location="cpu", weights_only=True)]
    if dist.is_initialized():
        dist.broadcast_object_list(state)
    return state[0]


def print_row(mode: str, row: dict[str, float]) -> None:
    values = " ".join(f"{name} {row[name]:.4f}" for name in row if name != "epoch")
    print(f"{mode} epoch {row['epoch']}: {values}", flush=True)


def init_distributed(device: torch.device) -> tuple[int, int]:
    """The rank of this process and the world size, if torchrun started it; else 0 and 1."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


if __name__ == "__main__":
    run_stage("train", main, MODES)
