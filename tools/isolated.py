"""Git and DVC in another folder, as if this machine had no Git settings of anyone."""

import os
import subprocess
import sys
from pathlib import Path

from transfer.common.errors import InputError
from transfer.common.paths import project_root

GIT = {
    "GIT_CONFIG_GLOBAL": str(Path(__file__).with_suffix(".gitconfig")),
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{who}_NAME": "demo" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "demo@localhost" for who in ("AUTHOR", "COMMITTER")},
}


def environment() -> dict[str, str]:
    """The environment for a command in another folder: this Python first on PATH.

    It has nothing that Git sets for its hooks (where another repository is), nothing that DVC sets
    for a stage or torchrun for a process. A relative ASSETS_DIR becomes absolute.
    """
    hidden = ("GIT_", "DVC_", "TORCHELASTIC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    if assets := kept.get("ASSETS_DIR"):
        kept["ASSETS_DIR"] = str(project_root() / os.path.expanduser(assets))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return kept | GIT | {"PATH": path}


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
