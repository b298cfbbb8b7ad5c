"""Make the virtual environment .venv from the hash-locked requirements.txt.

Needs only Python's standard library. With --cpu, for Linux without an NVIDIA GPU, torch comes
without its 5 GB of CUDA libraries: the locked versions, from PyTorch's own index, whose files pip
cannot check against the lock file.
"""

import argparse
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
VENV, LOCK = ROOT / ".venv", ROOT / "requirements.txt"
DONE = VENV / "installed"  # says where, with which Python and from which lock file it was made
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# With these, pip would install into another place. Its indexes, proxies and certificates stay.
ELSEWHERE = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_DRY_RUN", "PYTHONHOME")


def set_up(cpu: bool) -> None:
    """Make the environment, unless it is complete."""
    if sys.version_info < (3, 11, 4):
        sys.exit(f"error: Python 3.11.4 or newer is needed; this is {sys.version.split()[0]}")
    lock = LOCK.read_text(encoding="utf-8")
    made = f"{VENV}\n{sys.version}\n{lock}"
    if DONE.is_file() and DONE.read_text(encoding="utf-8") == made:
        DONE.touch()  # newer than the lock file, for make
        return
    for name in ELSEWHERE:
        os.environ.pop(name, None)
    venv.create(VENV, clear=Path(sys.prefix) != VENV, with_pip=True, symlinks=os.name != "nt")
    python = str(VENV / ("Scripts" if os.name == "nt" else "bin") / "python")
    pip = [python, "-m", "pip", "install", "--no-deps"]
    requirements = VENV / "requirements.txt"
    requirements.write_text(without_cuda(lock) if cpu else lock, encoding="utf-8")
    if cpu:
        torch = re.findall(r"^torch\w*==\S+", lock, re.M)
        subprocess.run([*pip, "--index-url", CPU_INDEX, *torch], check=True)
    subprocess.run([*pip, "--require-hashes", "--requirement", str(requirements)], check=True)
    subprocess.run([python, "-c", "import dvc, matplotlib, torch, torchvision"], check=True)
    DONE.write_text(made, encoding="utf-8")
    script = ".venv\\Scripts\\activate" if os.name == "nt" else "source .venv/bin/activate"
    print(f"Ready. To activate the environment: {script}", flush=True)


def without_cuda(lock: str) -> str:
    """The entries of a lock file but torch, torchvision and the CUDA libraries."""
    entries = re.split(r"\n(?=\w)", lock)
    return "\n".join(e for e in entries if not re.match("torch|triton|nvidia-|cuda-", e))


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.setup", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="torch without CUDA")
    cpu = parser.parse_args().cpu
    try:
        set_up(cpu)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {' '.join(error.cmd[1:4])} failed; its message stands above")


if __name__ == "__main__":
    main()
