"""Files from outside: from the folder that ASSETS_DIR names, or downloaded; always checked."""

import os
import sys
from pathlib import Path

import pooch
import requests

from transfer.common.errors import InputError
from transfer.common.files import file_digest, project_root, replacing

TIMEOUT = 30  # seconds without a connection, or without a byte
RETRIES = 4  # after 1, 2, 3 and 4 seconds
OFFLINE = "docs/troubleshooting.md says how to work without internet"


def assets_dir() -> Path | None:
    """The folder that the environment variable ASSETS_DIR names; None if it is not set.

    A relative path starts at the project, also in a temporary copy of it that DVC runs.
    """
    value = os.environ.get("ASSETS_DIR")
    if not value:
        return None
    folder = project_root() / os.path.expanduser(value)
    if not folder.is_dir():
        raise InputError(f"ASSETS_DIR = {value}: {folder} is no folder; {OFFLINE}")
    return folder


def fetch(url: str, path: Path, algorithm: str, digest: str) -> None:
    """Make sure that `path` holds the file whose hash starts with `digest`; download it if not.

    `algorithm` is "md5" or "sha256", `digest` the first hex digits of the hash, or all. `path` only
    ever changes to the whole, checked file, so two processes at once do no harm. Raises InputError
    when the file cannot be had or written.
    """

    def matches(file: str | Path) -> bool:
        return file_digest(Path(file), algorithm).startswith(digest)

    def download(url: str, file: str, _: pooch.Pooch) -> None:
        http = pooch.HTTPDownloader(
            progressbar=sys.stderr.isatty(), chunk_size=2**16, timeout=TIMEOUT
        )
        http(url, file, None)
        if not matches(file):
            raise ValueError(f"its {algorithm} is not {digest}")

    if path.is_file() and matches(path):
        return
    with replacing(path) as partial:
        cache = pooch.create(
            partial.parent,
            base_url="",
            registry={partial.name: None},
            urls={partial.name: url},
            retry_if_failed=RETRIES,
        )
        try:
            cache.fetch(partial.name, downloader=download)
        except (requests.RequestException, ValueError) as error:
            cause: BaseException = error
            while deeper := cause.__cause__ or cause.__context__:
                cause = deeper
            reason = str(getattr(cause, "strerror", None) or cause)
            raise InputError(f"{url}: cannot be downloaded: {reason}; {OFFLINE}") from None
