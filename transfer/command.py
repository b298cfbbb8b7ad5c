"""How a stage runs: ended with DVC, errors in one line, its cost written down."""

import importlib.metadata
import json
import os
import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from transfer.errors import exit_cleanly
from transfer.files import write_json

COST = Path("metrics/cost.json")
# What pins the instructions that torch, oneDNN and MKL compute with.
PINS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")


def machine() -> dict[str, str | int]:
    """What the last digits of a floating-point result may depend on, beside the settings."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    packages = ("torch", "torchvision", "numpy", "dvc")
    return {
        "cpu": cpu,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ[name] for name in PINS if name in os.environ},
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def end_with_dvc() -> None:
    """Terminate this process as soon as the DVC that runs it has ended, however it ended.

    Otherwise a stage would go on after its `dvc repro` was killed, beside the next one's.
    """

    def wait(dvc: psutil.Process) -> None:
        with suppress(psutil.NoSuchProcess):
            while dvc.status() != psutil.STATUS_ZOMBIE:  # dead, but its parent has not noticed
                time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    if "DVC_STAGE" in os.environ:
        with suppress(psutil.Error, StopIteration):
            # DVC names the stage to all that it starts (a shell, torchrun), and is above them.
            parents = psutil.Process().parents()
            dvc = next(parent for parent in parents if "DVC_STAGE" not in parent.environ())
            threading.Thread(target=wait, args=[dvc], daemon=True).start()


def run_stage(name: str, main: Callable[[], None]) -> None:
    """Run the stage `name`, then write its time and peak memory into metrics/cost.json.

    So is the machine that it ran on: the file is a record, not a reproducible result.
    """

    def stage() -> None:
        start = time.perf_counter()
        main()
        if os.environ.get("RANK", "0") != "0":
            return  # torchrun started several processes: the first one writes
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, see getrusage(2) there
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        try:
            costs = dict(json.loads(COST.read_text()))
        except (OSError, ValueError, TypeError):
            costs = {}
        costs.pop("machine", None)
        costs[name] = {"seconds": round(time.perf_counter() - start, 1), "peak_mib": peak // 2**20}
        write_json(COST, costs | {"machine": machine()})

    end_with_dvc()
    exit_cleanly(stage)
