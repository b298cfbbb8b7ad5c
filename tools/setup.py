"""Make the virtual environment .venv from the hash-locked requirements.txt.

Needs nothing but Python's standard library: `python -m tools.setup [--cpu] [COMMAND ...]`. A
COMMAND, such as `dvc repro`, then runs in the environment. With `--cpu`, for Linux without an
NVIDIA GPU, torch comes without its 5 GB of CUDA libraries: the locked versions, from PyTorch's own
package index, which has other files, so that pip cannot check them against the lock file.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from transfer.common.errors import exit_cleanly

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv"
LOCK = ROOT / "requirements.txt"
DONE = FOLDER / "installed"  # a copy of the lock file that is installed
SCRIPTS = FOLDER / ("Scripts" if os.name == "nt" else "bin")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def installs(cpu: bool) -> list[list[str]]:
    """The arguments of each `pip install` that is needed."""
    lock, options = LOCK, ["--no-deps"]
    commands: list[list[str]] = []
    if cpu and sys.platform == "linux":
        text = LOCK.read_text(encoding="utf-8")
        cuda = re.compile("torch|triton|nvidia-|cuda-")
        versions = re.findall(r"^torch\w*==\S+", text, re.M)
        commands.append([*options, "--index-url", CPU_INDEX, *versions])
        lock = FOLDER / "requirements.txt"
        kept = [entry for entry in re.split(r"\n(?=\w)", text) if not cuda.match(entry)]
        lock.write_text("\n".join(kept), encoding="utf-8")
    return [*commands, [*options, "--require-hashes", "--requirement", str(lock)]]


def set_up(cpu: bool) -> None:
    """Make the environment, unless it is complete."""
    if sys.version_info < (3, 11, 4):
        sys.exit(
            f"error: Python 3.11.4 or newer is needed; this is {sys.version.split()[0]}. Install "
            "one from https://www.python.org/downloads/ and run this with it"
        )
    if DONE.is_file() and DONE.read_bytes() == LOCK.read_bytes():
        if cpu:
            print(".venv is complete; to change what --cpu decides, delete it first", flush=True)
        os.utime(DONE)  # newer than the lock file, for make
        return
    python = SCRIPTS / ("python.exe" if os.name == "nt" else "python")
    if not list(SCRIPTS.glob("pip*")):  # the last thing that venv makes
        venv.create(FOLDER, with_pip=True, symlinks=os.name != "nt")
    for options in installs(cpu):
        if status := subprocess.run([str(python), "-m", "pip", "install", *options]).returncode:
            sys.exit(status)
    shutil.copyfile(LOCK, DONE)
    script = ".venv\\Scripts\\activate" if os.name == "nt" else "source .venv/bin/activate"
    print(f"Ready. To activate the environment: {script}", flush=True)


def run(command: list[str]) -> int:
    """The exit status of `command`, run in the environment."""
    path = os.pathsep.join((str(SCRIPTS), os.environ.get("PATH", "")))
    program = shutil.which(command[0], path=path)
    if not program:
        sys.exit(f"error: {command[0]}: there is no such program in .venv or in PATH")
    variables = os.environ | {"PATH": path, "VIRTUAL_ENV": str(FOLDER)}
    try:
        return wait_for([program, *command[1:]], env=variables)
    except KeyboardInterrupt:  # the command has said what there is to say
        return 130


def wait_for(command: list[str], **options: Any) -> int:
    """The exit status of `command`, run with the `options` of subprocess.Popen.

    Ctrl-C reaches the command also. It has the time that it takes to clean up, where
    subprocess.run would kill it after a quarter of a second. Raises KeyboardInterrupt then. What
    else ends this process, SIGTERM for example, ends the command.
    """
    with subprocess.Popen(command, **options) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        except BaseException:
            process.terminate()
            raise


def main() -> None:
    arguments = sys.argv[1:]
    cpu = arguments[:1] == ["--cpu"]
    command = arguments[cpu:]
    if command[:1] and command[0].startswith("-"):
        sys.exit(f"error: {command[0]}: unknown option; usage: tools.setup [--cpu] [COMMAND ...]")
    set_up(cpu)
    sys.exit(run(command) if command else 0)


if __name__ == "__main__":
    exit_cleanly(main)
