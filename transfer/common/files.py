"""Writing files so that each appears whole or not at all; reading tables only if they are whole."""

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvc.fs import localfs
from dvc.ignore import DvcIgnoreFilter

from transfer.common.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path next to `path`, with the same name; it takes `path`'s place on success.

    What is made there may be a file or a folder. Raises InputError, which names `path`, when the
    disk is full or the place cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
            partial = Path(folder, path.name)
            yield partial
            old = Path(folder, "old")
            try:
                if path.is_dir():  # only an empty folder can be replaced in one step
                    os.replace(path, old)
                os.replace(partial, path)
            finally:
                if old.exists() and not path.exists():  # interrupted between the two
                    os.replace(old, path)
    except OSError as error:
        reason = error.strerror or error  # numpy gives no strerror
        raise InputError(
            f"{path}: cannot be written: {reason}; what was there is unchanged"
        ) from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8."""
    write_bytes(path, text.encode())


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows`, which all have the same keys, to `path` with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv(path: Path, columns: dict[str, Callable[[str], Any]]) -> dict[str, list]:
    """The `columns` of the table at `path`, each value converted by the column's function.

    Raises InputError, which names the file, when it is not such a table.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        if not rows or not text.endswith("\n"):
            raise ValueError("it is empty or cut off")
        return {name: [convert(row[name]) for row in rows] for name, convert in columns.items()}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error!r}; run dvc repro") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def require_hashed(folder: Path, files: Iterable[Path]) -> None:
    """Raise InputError, which names it, if one of the `files` in `folder` is not hashed by DVC,
    which does not follow links to folders and leaves out what .dvcignore matches: it would not
    notice a change.
    """
    hashed = {
        os.path.normpath(Path(parent, name))
        for parent, _, names in DvcIgnoreFilter(localfs, os.getcwd()).walk(localfs, str(folder))
        for name in names
    }
    for path in files:
        if os.path.normpath(path) not in hashed:
            raise InputError(
                f"{path}: DVC would not notice a change of it, as it is, or is in, a link to a "
                "folder, or .dvcignore matches it; replace the link by a copy, or change .dvcignore"
            )


def file_digest(path: Path) -> str:
    """The sha256 (hexadecimal) of the file at `path`. Raises OSError when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
