"""Pretrained weights: torchvision's official ones, or a state dict of your own."""

import hashlib
import os
import re
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors.torch
import torch
import torchvision
from torch import Tensor

from transfer.common.errors import InputError, memory_is_exhausted
from transfer.common.files import file_digest, require_hashed
from transfer.fetch import assets_dir, fetch, missing_asset

OWN = Path("weights")  # DVC watches this folder, so that a changed file is noticed

# sha256 (see `content_digest`) of the "features.*" tensors of torchvision's checkpoints, for
# those that may come without their classifier: the file of mobilenet_v3_small with sha256
# 047dcff4addef86ea5bc2eff13c9614dc11f47ab1160d0a71a25e7db994f4e1f.
FEATURES_DIGEST = {
    ("mobilenet_v3_small", "IMAGENET1K_V1"): (
        "ada23de2f2263e0dccc27ab4f0d06881ac08dc4126fdd87020a3c1d7aa40a21a"
    ),
}

# Where training scripts put a state dict into a larger checkpoint, and what wrappers (DataParallel,
# Lightning modules, torch.compile) put before its keys.
CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model")
PREFIXES = re.compile(r"((module|model|_orig_mod)\.)*")


def pretrained(name: str, weights: str) -> dict[str, Tensor]:
    """The state dict that `weights` stands for: the name of torchvision weights, or a path.

    Official weights come from the folder ASSETS_DIR, as the official file or as
    NAME-WEIGHTS-features.pth, or else from torch's cache or a download; each is checked against its
    sha256. Raises InputError when they are missing or not what the checksum says.
    """
    official = torchvision.models.get_model_weights(name).__members__
    if weights not in official:
        return read_state_dict(_own(weights, ", ".join(official)))
    url = official[weights].url
    assets = assets_dir()
    path = (assets or Path(torch.hub.get_dir(), "checkpoints")) / Path(urlparse(url).path).name
    features = path.with_name(f"{name}-{weights}-features.pth")
    if assets and not path.is_file() and features.is_file():
        state = read_state_dict(features)
        if content_digest(state) != FEATURES_DIGEST.get((name, weights)):
            raise InputError(f"{features}: is not the features of torchvision's {weights}")
        return state
    prefix = path.stem.rpartition("-")[2]  # torchvision names a file by its sha256's start

    def is_right(file: Path) -> bool:
        return file_digest(file).startswith(prefix)

    if not assets:
        fetch(url, path, is_right)
    elif not path.is_file():
        raise missing_asset(path, f"torchvision's weights {weights} of {name}, {url}")
    elif not is_right(path):
        raise InputError(f"{path}: is damaged or altered: its sha256 does not start with {prefix}")
    return read_state_dict(path)


def _own(weights: str, official: str) -> Path:
    """The file `weights`, which must be where DVC notices when it changes."""
    path = Path(os.path.normpath(Path(weights).absolute()))
    if path.exists() and OWN.absolute() not in path.parents:
        raise InputError(
            f"model.weights = {weights!r}: must be in the folder {OWN}/, where DVC notices when it "
            f"changes; move it there and take {(OWN / path.name).as_posix()}"
        )
    if not path.is_file():
        problem = "is no regular file" if path.exists() else "does not exist"
        raise InputError(
            f"model.weights = {weights!r}: {problem}; take a file in {OWN}/ or one of {official}"
        )
    require_hashed(OWN.absolute(), [path])
    return path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict as people have them: .safetensors, or torch's format, no code unpickled.

    It may be inside a checkpoint and have the prefixes of wrappers; a line says what was removed.
    Raises InputError, which names the file and the tensor.
    """
    state, changes = _unwrapped(_loaded(path))
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path}: must be a state dict: names and tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(
                f"{path}: must be a state dict: names and tensors, but {key!r} is "
                f"a {type(value).__name__}; save model.state_dict()"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise InputError(f"{path}: {key} is not a plain tensor; save it dense, in float32")
    if changes:
        print(f"{path}: read {', '.join(changes)}", flush=True)
    return {key: value.detach() for key, value in state.items()}


def _loaded(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # torch does not look at the checksums in the archive: it reads a flipped bit silently.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if record := archive.testzip():
                    raise InputError(f"{path}: is damaged: the checksum of {record} does not fit")
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch.load has no common base for what it raises on bad files
        if memory_is_exhausted(error):
            raise
        reason = getattr(error, "strerror", None) or (
            "it is damaged, or holds other objects than tensors, such as a whole pickled model or "
            "TorchScript, which could run code and is not read; save model.state_dict()"
        )
        raise InputError(f"{path}: cannot be read as a state dict: {reason}") from None


def _unwrapped(state: Any) -> tuple[Any, list[str]]:
    """`state` without the containers and prefixes around it, and what these were."""
    changes = []
    while isinstance(state, dict) and (
        found := [name for name in CONTAINERS if isinstance(state.get(name), dict)]
    ):
        state = state[found[0]]
        changes.append(f"what is in {found[0]!r}")
    if isinstance(state, dict) and state and all(isinstance(key, str) for key in state):
        prefix = min((PREFIXES.match(key)[0] for key in state), key=len)  # type: ignore[index]
        if prefix and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            changes.append(f"without the prefix {prefix!r}")
    return state, changes


def content_digest(state: dict[str, Tensor]) -> str:
    """sha256 over each key and the little-endian bytes of its tensor, in the keys' order."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
