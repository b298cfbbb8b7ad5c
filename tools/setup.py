"""Make the virtual environment .venv from the hash-locked requirements.txt.

Needs nothing but Python's standard library: `python -m tools.setup`, then activate .venv.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv"
LOCK = ROOT / "requirements.txt"
DONE = FOLDER / "installed"  # a copy of the lock file that is installed


def main() -> None:
    if sys.version_info < (3, 11, 4):
        sys.exit(f"error: Python 3.11.4 or newer is needed; this is {sys.version.split()[0]}")
    if DONE.is_file() and DONE.read_bytes() == LOCK.read_bytes():
        os.utime(DONE)  # newer than the lock file, for make
        return
    python = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(FOLDER, with_pip=True)
    pip = [python, "-m", "pip", "install", "--require-hashes", "--requirement", LOCK]
    if status := subprocess.run(pip).returncode:
        sys.exit(status)
    shutil.copyfile(LOCK, DONE)
    script = ".venv\\Scripts\\activate" if os.name == "nt" else "source .venv/bin/activate"
    print(f"Ready. Activate the environment: {script}")


if __name__ == "__main__":
    main()
