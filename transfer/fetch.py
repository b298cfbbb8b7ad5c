"""Files from outside: from the folder that ASSETS_DIR names, or downloaded; always checked."""

import errno
import http.client
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from transfer.common.errors import InputError
from transfer.common.files import replacing
from transfer.common.paths import project_root

TIMEOUT = 30  # seconds without a connection, or without a byte
TRIES = 4  # with pauses of 1, 2 and 3 seconds
CONTENTS = "docs/troubleshooting.md says what belongs in it"
OFFLINE = "without internet, set ASSETS_DIR (docs/troubleshooting.md) or run python -m tools.demo"


def assets_dir() -> Path | None:
    """The folder that the environment variable ASSETS_DIR names; None if it is not set.

    A relative path starts at the project, also in a temporary copy of it that DVC runs.
    """
    value = os.environ.get("ASSETS_DIR")
    if not value:
        return None
    folder = project_root() / os.path.expanduser(value)
    if not folder.is_dir():
        raise InputError(f"ASSETS_DIR = {value}: {folder} is no folder; {CONTENTS}")
    return folder


def missing_asset(path: Path, what: str) -> InputError:
    """The error that ASSETS_DIR lacks `path`, which should be `what`."""
    return InputError(
        f"{path}: is missing: the environment variable ASSETS_DIR names a folder that must hold "
        f"{what}; put it there, or unset ASSETS_DIR to download it"
    )


def fetch(url: str, path: Path, is_right: Callable[[Path], bool]) -> None:
    """Make sure that `path` holds a file that `is_right`, a check of its hash; download it if not.

    `path` only ever changes to the whole, checked file, so two processes at once do no harm. Raises
    InputError when the file cannot be had or written.
    """
    if path.is_file() and is_right(path):
        return
    with replacing(path) as partial:
        for number in range(1, TRIES + 1):
            try:
                socket.setdefaulttimeout(TIMEOUT)
                torch.hub.download_url_to_file(url, str(partial), progress=sys.stderr.isatty())
                if is_right(partial):
                    return
                reason = "its checksum is wrong"
            except (OSError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
                reason = str(error)
            finally:
                socket.setdefaulttimeout(None)
            if number < TRIES:
                time.sleep(number)
        raise InputError(f"{url}: cannot be downloaded: {reason}; {OFFLINE}")
