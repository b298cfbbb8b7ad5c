"""Downloads that go on where they stopped, and count only once they are checked."""

import fcntl
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from transfer.errors import InputError

WAITS = (1, 2, 4, 8)  # seconds before each further try
TIMEOUT = 30  # seconds without a connection, or without a byte of what should come
CHUNK = 2**20  # bytes at most between two updates of the progress bar
BUSY = (408, 429)  # the client errors, of all below 500, that a wait may help


def fetch(url: str, path: Path, algorithm: str, digest: str) -> None:
    """Make sure that `path` holds the file whose hash starts with `digest`; download it if not.

    `algorithm` is "md5" or "sha256", `digest` the first hex digits of the hash, or all. What came
    so far is kept in `path`.part, from which the next try, or the next run, goes on. `path` itself
    only ever changes to the whole, checked file. Processes that want the same file take turns.

    Raises InputError when the file cannot be had or written.
    """
    part = path.with_name(f"{path.name}.part")

    def checked(file: BinaryIO) -> bool:
        file.seek(0)
        return hashlib.file_digest(file, algorithm).hexdigest().startswith(digest)

    def is_there() -> bool:
        with suppress(FileNotFoundError), path.open("rb") as file:
            return checked(file)
        return False

    try:
        if is_there():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part) as file:
            if is_there():  # another process has downloaded it meanwhile
                part.unlink()
            else:
                _complete(url, file, checked, f"its {algorithm} is not {digest}")
                os.replace(part, path)
    except OSError as error:
        raise InputError(
            f"{error.filename or part}: {error.strerror or error}; make room or let it be written "
            "there, or set TORCH_HOME to another folder, and try again"
        ) from None


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """`part`, made if it is not there, open to read and append; no other process has it so."""
    while True:
        with part.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _tell(f"{part}: another process is downloading it; waiting")
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(part, file):  # not if the one waited for has finished and renamed it
                yield file
                return


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _complete(url: str, file: BinaryIO, checked: Callable[[BinaryIO], bool], wrong: str) -> None:
    """Download into `file` until it is `checked`; InputError with `wrong` if it never is."""
    have = _size(file)
    if have and checked(file):  # a run was killed just before it could rename it
        return
    _tell(f"{url}: downloading" + (f", going on after {have / 1e6:.1f} MB" if have else ""))
    seen_wrong = False
    for wait in (*WAITS, None):
        problem = _receive(url, file)
        if checked(file):  # if so, it does not matter how the server ended
            return
        if problem is None:
            problem = wrong
            file.truncate(0)
            if seen_wrong:  # a second download from the start: a third would be no better
                break
            seen_wrong = True
        if wait is not None:
            _tell(f"{url}: {problem}; trying again in {wait} s")
            time.sleep(wait)
    resumes = ": it goes on where it stopped" if _size(file) else ""
    raise InputError(
        f"{url}: {problem}; try again{resumes}, or set ASSETS_DIR (README.md, Without internet)"
    )


def _receive(url: str, file: BinaryIO) -> str | None:
    """Append to `file` what it lacks of `url`; what went wrong, if another try may help."""
    have, answered, total = _size(file), False, None
    # A server that compressed on the way would count other bytes than those of the file.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            answered, status = True, response.status_code
            total = _size_if_rest(response, have)
            if have and total is None and status in (206, 416):
                file.truncate(0)
                return _receive(url, file)
            if status == 200:  # from the start, whether or not the rest was asked for
                if have:
                    file.truncate(0)
                total = response.raw.length_remaining  # what Content-Length says, if anything
            elif total is None:
                problem = f"the server answers {status} {response.reason}"
                if status >= 500 or status in BUSY:
                    return problem
                raise InputError(f"{url}: {problem}; set ASSETS_DIR (README.md, Without internet)")
            _append(response, file, Path(url).name, total)
    except (requests.RequestException, HTTPError) as error:
        cause = error
        while deeper := cause.__cause__ or cause.__context__:
            cause = deeper
        reason = getattr(cause, "strerror", None) or cause
        if not answered:
            return f"no answer: {reason}"
        return _cut(file, total) + (f": {reason}" if isinstance(cause, OSError) else "")
    # A server may send less of a range than it was asked for.
    return None if total is None or _size(file) >= total else _cut(file, total)


def _size_if_rest(response: requests.Response, have: int) -> int | None:
    """The size of the whole file in bytes, if the response is its rest after `have` bytes."""
    sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if response.status_code == 206 and sent and int(sent[1]) == have:
        return int(sent[2])
    return None


def _append(response: requests.Response, file: BinaryIO, name: str, total: int | None) -> None:
    """Append the response's body to `file` as it comes; the bar `name` counts to `total` bytes."""
    bar = tqdm(
        desc=name, total=total, initial=_size(file), unit="B", unit_scale=True,
        leave=False, disable=None,
    )  # fmt: skip
    with bar:
        # Each piece as it comes, so that a cut loses none; not decoded, for the file itself may
        # be what a server calls the encoding: gzip.
        while chunk := response.raw.read1(CHUNK, decode_content=False):
            file.write(chunk)
            file.flush()
            bar.update(len(chunk))


def _cut(file: BinaryIO, total: int | None) -> str:
    of = f" of {total / 1e6:.1f}" if total else ""
    return f"connection cut after {_size(file) / 1e6:.1f}{of} MB"


def _size(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
