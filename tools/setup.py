"""Make the virtual environment .venv from the hash-locked requirements.txt.

Needs nothing but Python's standard library: `python -m tools.setup`, then activate .venv. With
`--without-torch` it leaves out torch, torchvision and the CUDA libraries, for another build.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv"
LOCK = ROOT / "requirements.txt"
DONE = FOLDER / "installed"  # a copy of the lock file that is installed


def main(without_torch: bool) -> None:
    if sys.version_info < (3, 11, 4):
        sys.exit(f"error: Python 3.11.4 or newer is needed; this is {sys.version.split()[0]}")
    if DONE.is_file() and DONE.read_bytes() == LOCK.read_bytes():
        os.utime(DONE)  # newer than the lock file, for make
        return
    python = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(FOLDER, with_pip=True, symlinks=os.name != "nt")
    lock = LOCK
    if without_torch:
        entries = re.split(r"\n(?=\w)", LOCK.read_text(encoding="utf-8"))
        lock = FOLDER / "requirements.txt"
        cuda = re.compile("torch|triton|nvidia-(?!ml-py)|cuda-")
        kept = [entry for entry in entries if not cuda.match(entry)]
        lock.write_text("\n".join(kept), encoding="utf-8")
    options = ["--require-hashes", "--no-deps", "--requirement", str(lock)]
    if status := subprocess.run([str(python), "-m", "pip", "install", *options]).returncode:
        sys.exit(status)
    shutil.copyfile(LOCK, DONE)
    script = ".venv\\Scripts\\activate" if os.name == "nt" else "source .venv/bin/activate"
    print(f"Ready. Activate the environment: {script}")


if __name__ == "__main__":
    try:
        main("--without-torch" in sys.argv[1:])
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
