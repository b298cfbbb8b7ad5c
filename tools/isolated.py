"""Git and DVC in a folder of its own, as if this machine had no settings of anyone."""

import os
import subprocess
import sys
from pathlib import Path

from transfer.common.errors import InputError
from transfer.fetch import assets_dir

# No settings but these. Any folder may be read, as the user's own settings might have said.
GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
    **{f"GIT_{who}_NAME": "demo" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "demo@localhost" for who in ("AUTHOR", "COMMITTER")},
}


def environment(assets: bool = False) -> dict[str, str]:
    """The environment for a command in another folder: this Python first on PATH.

    It has nothing of what Git sets for its hooks (where another repository is), of the user's Git
    settings (signing, hooks, line ends), of a launcher of several processes, nor ASSETS_DIR, but
    with `assets` as an absolute path.
    """
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GIT_", "DVC_", "TORCHELASTIC_"))
        and name not in (*launchers, "ASSETS_DIR")
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    folder = assets_dir() if assets else None
    named = {"ASSETS_DIR": str(folder.absolute())} if folder else {}
    return kept | GIT | named | {"PATH": path}


def git(folder: Path, *arguments: str) -> str:
    """What `git ARGUMENTS` prints in `folder`. Raises InputError when it fails."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, env=environment(), encoding="utf-8",
            capture_output=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise InputError("git: is not installed, or not on PATH") from None
    if done.returncode:
        raise InputError(f"git {arguments[0]} in {folder}: {done.stderr.strip()}")
    return done.stdout
