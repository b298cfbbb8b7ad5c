"""How a stage runs: it ends together with DVC, its errors are one line, its cost is recorded."""

import importlib.metadata
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from transfer.common.errors import InputError, exit_cleanly, fail, printable
from transfer.common.files import write_json
from transfer.common.paths import COST, project_root

INTERVAL = 0.1  # seconds between two looks at memory and at DVC
# The variables that choose the instructions that torch, oneDNN and MKL compute with.
INSTRUCTION_SETS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")
# What torchrun sets for each of its processes. Some clusters set a part of it for every process.
TORCHRUN = (
    "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def run_stage(name: str, main: Callable[[], None], torchrun: bool = False) -> None:
    """Run the stage `name`, then record its time and peak memory in metrics/cost.json.

    With `torchrun` this may be one of the processes that torchrun started: then torchrun reports
    the error of the first that fails, and only the first process records.
    """
    several = torchrun and under_torchrun()

    def stage() -> None:
        refuse_lost_experiment()
        start = time.perf_counter()
        main()
        if several and os.environ["RANK"] != "0":
            return
        try:
            costs = dict(json.loads(COST.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            costs = {}
        costs.pop("machine", None)
        seconds = round(time.perf_counter() - start, 1)
        costs[name] = {"seconds": seconds, "peak_mib": max(memory) // 2**20}
        write_json(COST, costs | {"machine": machine()})

    memory = [psutil.Process().memory_info().rss]
    threading.Thread(target=watch, args=[memory], daemon=True).start()
    exit_cleanly(stage, fail_in_torchrun if several else fail)


def under_torchrun() -> bool:
    """Whether torchrun started this process, as one of several that train together."""
    return all(os.environ.get(name) for name in TORCHRUN)


def fail_in_torchrun(message: str) -> None:
    """Leave the error in the file in which torchrun looks for it: its own report ends with it."""
    if os.environ["RANK"] != "0":
        time.sleep(5)  # most mistakes fail in every process: let the first one report them
    line = f"error: {printable(message)}"
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        sys.exit(line)
    report = {"message": line, "timestamp": int(time.time())}
    Path(path).write_text(json.dumps(report), encoding="utf-8")
    sys.exit(1)


def watch(memory: list[int]) -> None:
    """Keep in `memory` the most resident memory seen, in bytes; end this process with its DVC.

    Without that, a stage would continue after its `dvc repro` was killed, next to the next one.
    """
    process, dvc = psutil.Process(), None
    if "DVC_STAGE" in os.environ:
        # DVC names the stage to all that it starts (a shell, torchrun), and is above them.
        with suppress(psutil.Error, StopIteration):
            dvc = next(above for above in process.parents() if "DVC_STAGE" not in above.environ())
    while dvc is None or _runs(dvc):
        memory[0] = max(memory[0], process.memory_info().rss)
        time.sleep(INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE  # dead, but its parent has not noticed
    return False


def refuse_lost_experiment() -> None:
    """Raise InputError in an experiment in a temporary copy of a shallow clone.

    DVC would lose it at its end: it cannot fetch commits from a shallow clone.
    """
    root = project_root()
    shallow = any((folder / ".git/shallow").exists() for folder in (root, *root.parents))
    if root != Path.cwd() and shallow:
        raise InputError(
            f"{root}: is a shallow clone, in which DVC loses experiments with --temp or "
            "--queue; run git fetch --unshallow there, or dvc exp run without them"
        )


def machine() -> dict[str, str | int | None]:
    """What the last digits of a floating-point result may depend on, besides the settings."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    packages = ("torch", "torchvision", "numpy", "dvc")
    return {
        "cpu": cpu,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ[name] for name in INSTRUCTION_SETS if name in os.environ},
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }
