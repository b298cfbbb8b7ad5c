"""Time to accuracy of the pipeline and of usual code: `make bench`, an hour, after `make repro`.

The peers train the same network on CIFAR-10's 50,000 training images, augmented one by one in two
worker processes, without validation. They use AdamW with the pipeline's peak learning rates, which
were not tuned for them; one epoch for the head comes first. Nothing else may run meanwhile.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import v2

from stages.train import train
from transfer import figures
from transfer.data import load_split, stratified
from transfer.model import IMAGENET, Network, freeze, load, predict
from transfer.run import assets_dir, machine, model_path, run_tool, set_up_torch, write_json
from transfer.settings import MODES, InputError, Params, load_params

GOALS = {"85%": 0.85, "87%": 0.87, "89%": 0.89}
COLOURS = {"notebook": "#009E73", "Lightning": "#CC79A7", "pipeline": figures.COLOURS["finetuned"]}
# Three amounts: the peers' epochs of fine-tuning, in all about 2.4, 5.6 and 12 minutes on two cores
# of an AMD EPYC (1,000 images per second when frozen, then 520); changed settings of the pipeline.
AMOUNTS: list[tuple[int, dict[str, dict[str, int]]]] = [
    (1, {"frozen": {"epochs": 2, "views": 1}, "finetuned": {"epochs": 1}}),
    (3, {"frozen": {"epochs": 4, "views": 2}, "finetuned": {"epochs": 2}}),
    (7, {}),  # those of params.yaml
]


def pipeline(network: Network, params: Params, changes: dict[str, dict[str, int]]) -> None:
    """Train as the stages do, with `changes` to the settings of the modes."""
    values = params.model_dump()
    for mode, settings in changes.items():
        values["train"][mode] |= settings
    params, data = Params.model_validate(values), load_split("train")
    share = params.train.shared.validation_share
    rest, drawn = stratified(data.labels, share, network.classes, params.seed, "validation_share")
    for mode in MODES:  # the first leaves the backbone frozen
        train(mode, network, data, rest, drawn, params)


def make_loader(params: Params, kit: Any, first: list, convert: list) -> DataLoader:
    """Batches of augmented images; `kit` is torchvision.transforms or its v2."""
    shared, root = params.train.shared, assets_dir() or Path(torch.hub.get_dir(), "datasets")
    crop = kit.RandomCrop(32, shared.max_shift, padding_mode="reflect")
    resize, normalise = kit.Resize(params.model.image_size), kit.Normalize(*IMAGENET.values())
    steps = [*first, crop, kit.RandomHorizontalFlip(), resize, *convert, normalise]
    data = datasets.CIFAR10(root, True, kit.Compose(steps), download=not assets_dir())
    return DataLoader(data, shared.batch_size, shuffle=True, num_workers=2, persistent_workers=True)


def start_phase(network: Network, params: Params, optimizer: Any, steps: int) -> Any:
    """Freeze the backbone if `optimizer` has only the head; return one cycle of learning rates."""
    network.train().requires_grad_(True).to(memory_format=torch.contiguous_format)  # as is usual
    rates = [params.train.finetuned.head_lr, params.train.finetuned.backbone_lr]
    if len(optimizer.param_groups) == 1:
        freeze(network.backbone)  # BatchNorm too, so that there is no backward pass through it
        rates = [params.train.frozen.head_lr]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps)


def fit(
    network: Network, params: Params, loader: DataLoader, parts: list[Any], epochs: int
) -> None:
    """A plain loop: train `parts`, the head or the head and the backbone."""
    optimizer = torch.optim.AdamW([{"params": part.parameters()} for part in parts])
    schedule = start_phase(network, params, optimizer, epochs * len(loader))
    for epoch in range(epochs):
        for x, labels in loader:
            loss = torch.nn.functional.cross_entropy(network(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{MODES[len(parts) - 1]} epoch {epoch + 1}:", flush=True)


def notebook(network: Network, params: Params, epochs: int) -> None:
    """PIL images and a plain loop."""
    loader = make_loader(params, transforms, [], [transforms.ToTensor()])
    fit(network, params, loader, [network.head], 1)
    fit(network, params, loader, [network.head, network.backbone], epochs)


def lightning(network: Network, params: Params, epochs: int) -> None:
    """Lightning's Trainer and BackboneFinetuning, torchvision's transforms v2 on tensors."""
    import pytorch_lightning as pl

    loader = make_loader(params, v2, [v2.ToImage()], [v2.ToDtype(torch.float32, scale=True)])

    class Classifier(pl.LightningModule):
        def configure_optimizers(self):
            return torch.optim.AdamW(network.head.parameters())

        def on_train_epoch_start(self):  # BackboneFinetuning has just added the backbone in epoch 1
            if self.current_epoch < 2:
                steps = (1, epochs)[self.current_epoch] * len(loader)
                self.schedule = start_phase(network, params, self.trainer.optimizers[0], steps)

        def training_step(self, batch, _):
            return torch.nn.functional.cross_entropy(network(batch[0]), batch[1])

        def on_train_batch_end(self, *_):
            self.schedule.step()

    model, thaw = Classifier(), pl.callbacks.BackboneFinetuning(1)
    model.head, model.backbone = network.head, network.backbone
    trainer = pl.Trainer(max_epochs=1 + epochs, accelerator="cpu", callbacks=thaw, barebones=True)
    trainer.fit(model, loader)


def measure(name: str, epochs: int, changes: dict[str, dict[str, int]]) -> dict[str, float]:
    """Train once, in this process: the minutes it takes, and the accuracy on the test set."""
    import pytorch_lightning  # noqa: F401  takes seconds, which do not count

    functions: dict[str, Any] = {"notebook": notebook, "Lightning": lightning, "pipeline": pipeline}
    set_start_method(None, force=True)  # of the peers' workers: the default, not this process's
    params = load_params()
    set_up_torch("cpu", params.train.threads)
    torch.manual_seed(params.seed)
    start = time.perf_counter()
    network = load(model_path("new"))
    functions[name](network, params, changes if name == "pipeline" else epochs)
    minutes = (time.perf_counter() - start) / 60
    images, labels, _ = load_split("test")
    correct = predict(network, images).argmax(1) == labels
    return {"minutes": minutes, "accuracy": correct.double().mean().item()}


def minutes_to(accuracy: float, runs: list[dict[str, float]]) -> float | None:
    """Minutes to `accuracy`, read between `runs`, whose minutes rise, on a logarithmic scale."""
    best: dict[float, float] = {}
    for run in runs:  # one that a shorter one beats does not count
        best.setdefault(max([run["accuracy"], *best]), np.log(run["minutes"]))
    found = np.interp(accuracy, [*best], [*best.values()], right=np.nan)
    # Where the shortest run has more, its minutes are found: the result is an upper bound.
    return None if np.isnan(found) else float(np.exp(found))


def draw(runs: dict[str, list], needed: dict[str, dict], ratio: dict[str, float]) -> None:
    """Accuracy against minutes, and how many times as fast the pipeline is to 87 % and 89 %."""
    figure, axes = figures.plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    ranked = sorted(runs, key=lambda name: runs[name][-1]["accuracy"])
    for name, side in zip(ranked, ("top", "bottom", "bottom"), strict=True):
        x, y = ([run[key] for run in runs[name]] for key in ("minutes", "accuracy"))
        axes.semilogx(x, y, "o-", color=COLOURS[name], lw=3.5 if name == "pipeline" else 1.5)
        axes.text(x[-1], y[-1], f"  {name}", va=side, color=COLOURS[name], weight="bold")
    for goal in [*ratio][1:]:
        own, level = needed["pipeline"][goal], GOALS[goal]
        peer, text = own * ratio[goal], f"{ratio[goal]:.1f} x at {goal[:-1]} %"
        axes.annotate("", (own, level), (peer, level), arrowprops={"arrowstyle": "<->"})
        axes.text((own * peer) ** 0.5, level + 0.001, text, ha="center", va="bottom")
    axes.set_xticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(figures.PERCENT)
    axes.set(title="Accuracy on the test set after so many minutes", xlabel="minutes (logarithmic)")
    figures.save(figure, Path("docs/minutes.png"))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not Path("data/prepared").exists():
        raise InputError("data/prepared: is missing; run make repro first")
    make_loader(load_params(), transforms, [], [])  # a download does not count
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in COLOURS}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as new_process:
        for amount, name in product(AMOUNTS, COLOURS):
            runs[name].append(new_process.submit(measure, name, *amount).result())
            print(name, runs[name][-1], flush=True)
    needed = {name: {goal: minutes_to(GOALS[goal], runs[name]) for goal in GOALS} for name in runs}
    ratio = {}
    for goal in GOALS:
        *peers, own = (times[goal] for times in needed.values())
        if own and any(peers):
            ratio[goal] = min(filter(None, peers)) / own
    results = {"machine": machine(), "runs": runs, "minutes_to": needed, "ratio": ratio}
    write_json(Path("benchmarks/results.json"), results)
    draw(runs, needed, ratio)
    rows = [(name, *row.values()) for name, row in (needed | {"times as fast": ratio}).items()]
    print("\nAt most so many minutes where the shortest run has a higher accuracy:\n")
    print(tabulate(rows, ("minutes to", *GOALS), floatfmt=".1f", missingval="not reached"))


if __name__ == "__main__":
    run_tool(main)
