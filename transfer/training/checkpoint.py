"""The state of unfinished training, kept so that a killed run resumes after its last epoch."""

import hashlib
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from transfer.common.errors import InputError
from transfer.common.files import file_digest, write_bytes
from transfer.common.paths import project_root
from transfer.common.run import machine

CODE = Path(__file__).parents[1]  # the folder transfer


def checkpoint_path(name: str, inputs: Iterable[Path], *facts: object) -> Path:
    """Where the state of unfinished training is kept: named by everything that decides the result.

    That is the code, the files and folders of `inputs`, the machine and `facts`. Of the paths only
    the names count: experiments in temporary copies share the folder in the project, so that it
    outlives them.
    """
    files: list[Path] = [*CODE.rglob("*.py")]
    for path in inputs:
        files += [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    try:
        contents = sorted((path.name, file_digest(path)) for path in files)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
    key = hashlib.sha256(repr((contents, name, machine(), facts)).encode()).hexdigest()
    return project_root() / ".checkpoints" / f"{name}-{key}"


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
        notice = f"{path}: is damaged and ignored; training starts from the beginning"
        print(notice, file=sys.stderr, flush=True)
        return None
    return torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
