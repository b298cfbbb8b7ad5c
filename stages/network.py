"""Stage `network`: the pretrained, cut backbone with a new head, and a table of its blocks."""

import hashlib
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

import safetensors.torch
import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from transfer.data import load_json
from transfer.model import (
    IMAGENET,
    Channels,
    Network,
    block_names,
    classifier,
    parameter_count,
    save,
)
from transfer.run import METRICS, OFFLINE, assets_dir, model_path, run_stage, write_text
from transfer.settings import InputError, ModelSettings, load_params

# In place of torchvision's mobilenet_v3_small-047dcff4.pth, a state dict with the tensors of its
# feature extractor alone is enough, because its classifier is not used.
FEATURES = "mobilenet_v3_small-IMAGENET1K_V1-features.pth"
FEATURES_SHA256 = "5178f08421e09b732632c07667d512d7ae595f6f0031a1183a3f03525aba8209"
# What DataParallel, Lightning and torch.compile put before the keys of a state dict.
PREFIX = re.compile(r"((module|model|_orig_mod)\.)*")


def main() -> None:
    params = load_params()
    settings = params.model
    torch.manual_seed(params.seed)
    original = classifier(settings.name)
    state, normalisation = read_weights(settings, original) if settings.weights else ({}, IMAGENET)
    network = Network(settings, load_json("classes"), normalisation)
    if settings.weights:
        fill(network.backbone.body, state, f"model.weights = {settings.weights}")
    save(network, model_path("new"))
    text = describe(network, original)
    write_text(METRICS / "architecture.txt", text)
    print(text, flush=True)


def read_weights(
    settings: ModelSettings, original: nn.Module
) -> tuple[dict[str, Tensor], Channels]:
    """The state dict that `model.weights` names, torchvision's or a file in weights/, and the mean
    and std of the channels with which it was trained (for a file: ImageNet's).

    torchvision's weights come from ASSETS_DIR, torch's cache or a download, and their sha256 is
    checked. Raises InputError if the weights are missing, damaged or no state dict.
    """
    official = torchvision.models.get_model_weights(settings.name).__members__
    if settings.weights not in official:
        return read_own_weights(Path(str(settings.weights)), list(official)), IMAGENET
    weights, assets = official[settings.weights], assets_dir()
    preset = weights.transforms()
    channels = {"mean": tuple(preset.mean), "std": tuple(preset.std)}
    if hasattr(original, "transform_input"):  # torchvision's forward pass would convert to these
        channels = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    try:
        if not assets:
            return weights.get_state_dict(check_hash=True), channels
        path = assets / Path(urlparse(weights.url).path).name  # its name ends in its hash
        sha256 = path.stem.rpartition("-")[2]
        features = assets / FEATURES
        if settings.name == "mobilenet_v3_small" and features.is_file() and not path.is_file():
            path, sha256 = features, FEATURES_SHA256
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(sha256):
            raise InputError(f"{path}: is damaged: its sha256 does not start with {sha256}")
        return load_state(path), channels
    except (RuntimeError, OSError) as error:
        raise InputError(f"{weights.url}: {error}; {OFFLINE}") from None


def read_own_weights(path: Path, official: list[str]) -> dict[str, Tensor]:
    """The state dict in a file in weights/, without a common prefix of a wrapper around it."""
    if path.parent != Path("weights") or not path.is_file():
        raise InputError(
            f"model.weights = {path}: must be a file in weights/, which DVC watches, or one of "
            f"{', '.join(official)}"
        )
    state = load_state(path)
    prefix = min((PREFIX.match(key)[0] for key in state), key=len)  # type: ignore[index]
    return {key.removeprefix(prefix): value for key, value in state.items()}


def load_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of .safetensors or of torch's format, also if it is under
    "state_dict" or "model" there. No code is unpickled.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = next((state[key] for key in ("state_dict", "model") if key in state), state)
        return {str(key): value.detach() for key, value in state.items()}
    except Exception:  # torch.load has no common base for what it raises
        raise InputError(
            f"{path}: is damaged or no state dict, names and tensors; save model.state_dict()"
        ) from None


def fill(backbone: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copy the tensors that `backbone` has from `state`, in any precision; others are ignored.

    Raises InputError, which starts with `where`, if a tensor is missing or does not fit.
    """
    for key, own in backbone.state_dict().items():
        if key.endswith("num_batches_tracked"):  # not used; old checkpoints lack it
            continue
        if key not in state:
            raise InputError(f"{where}: has no {key}; take a state dict of the whole network")
        if state[key].shape != own.shape or not state[key].isfinite().all():
            raise InputError(f"{where}: {key} is not finite or not of shape {tuple(own.shape)}")
        own.copy_(state[key])


def describe(network: Network, original: nn.Module) -> str:
    """A table of the blocks: what is kept, cut and new, and what is trained in which mode."""
    settings, names = network.settings, block_names(original)
    head = {f"head.{name}": module for name, module in network.head.named_children()}
    modules = dict(original.named_modules()) | head
    parts = dict.fromkeys(names, "cut") | dict.fromkeys(names[: settings.blocks], "kept")
    parts = {name: part for name, part in parts.items() if name in modules}
    parts |= dict.fromkeys(head, "new")

    # One blank image shows the shape of what each block makes, and its multiply-accumulates.
    shapes: dict[str, torch.Size] = {}
    for name in parts:
        modules[name].register_forward_hook(
            lambda _, x, output, name=name: shapes.update({name: output.shape[1:]})
        )
    blank = torch.zeros(1, 3, settings.image_size, settings.image_size)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network.eval()(blank)
        with suppress(RuntimeError):  # the image may be too small for the blocks that are cut
            original.eval()(blank)
    counts = {key.partition(".")[2]: sum(n.values()) for key, n in counter.flop_counts.items()}

    trained = {"kept": ("fixed", "trained"), "cut": ("", ""), "new": ("trained", "trained")}
    rows = [
        (part, name, type(modules[name]).__name__, " x ".join(map(str, shapes.get(name, "-"))),
         parameter_count(modules[name]), counts.get(name, 0) // 2, *trained[part])
        for name, part in parts.items()
    ]  # fmt: skip
    header = ("", "block", "kind", "output", "parameters", "MACs", "frozen", "finetuned")
    *_, last = (n for n, m in original.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    mean, std = ([round(v, 3) for v in values.tolist()] for values in (network.mean, network.std))
    return f"""\
{settings.name}, cut after {names[: settings.blocks][-1]}, with a new {settings.head} head for \
{len(network.classes)} classes

{tabulate(rows, header, "plain", intfmt=",")}

input        {settings.image_size} x {settings.image_size} pixels, mean {mean}, std {std}
frozen       trains {parameter_count(network.head):,} of {parameter_count(network):,} parameters
finetuned    trains all {parameter_count(network):,} parameters
last layer   was {last} = {modules[last]}
MACs         multiply-accumulates of convolutions and linear layers, for one image
"""


if __name__ == "__main__":
    run_stage("network", main)
