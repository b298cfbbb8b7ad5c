"""The state of unfinished training, kept so that a killed run goes on where it stopped."""

import hashlib
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from transfer.errors import InputError
from transfer.files import sha256, write_bytes


def key(files: Iterable[Path], *facts: object) -> str:
    """Hex digest of everything that determines a result: what `files` hold, and `facts`.

    Of the paths only the names count, so that a copy of the project elsewhere has the same key.
    """
    try:
        contents = sorted((path.name, sha256(path)) for path in files)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return hashlib.sha256(repr((contents, facts)).encode()).hexdigest()


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, of tensors and plain values, and its sha256 before it."""
    content = io.BytesIO()
    torch.save(state, content)
    write_bytes(path, hashlib.sha256(content.getbuffer()).digest() + content.getbuffer())


def load(path: Path) -> dict[str, Any] | None:
    """What `save` wrote to `path`; None if there is no such file, or, with a notice, if it is
    damaged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        print(f"{path}: is damaged and ignored; training starts anew", file=sys.stderr, flush=True)
        return None
    return torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
