"""Writing files so that each appears whole or not at all; reading them only if they are whole."""

import csv
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transfer.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its name; it takes `path`'s place on success.

    What is made there may be a file or a folder. Raises InputError, which names `path`, when the
    disk is full or the place cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
            partial = Path(folder, path.name)
            yield partial
            if path.is_dir():  # only an empty folder can be replaced in one step
                path.rename(Path(folder, "old"))
            partial.rename(path)
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


def read_csv(
    path: Path, columns: dict[str, Callable[[str], Any]], delimiter: str = ","
) -> dict[str, list]:
    """The `columns` of the table at `path`, each value read by the column's function.

    Raises InputError, which names the file and the line, when it is not such a table.
    """
    table = {name: [] for name in columns}
    try:
        text = path.read_text(encoding="utf-8")
        rows = csv.DictReader(text.splitlines(), delimiter=delimiter, strict=True)
        for line, row in enumerate(rows, 2):
            for name, read in columns.items():
                try:
                    table[name].append(read(row[name]))
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"{path}, line {line}: {error!r}; run dvc repro") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: {error}; run dvc repro") from None
    if not text.endswith("\n") or not all(table.values()):
        raise InputError(f"{path}: is empty or cut off; run dvc repro")
    return table


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, keys in the order given."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256(path: Path) -> str:
    """The hex digest of the file at `path`. Raises OSError when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
