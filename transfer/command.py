"""How a command of this project runs: errors in one line, its cost written down."""

import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from transfer.files import write_json

COST = Path("metrics/cost.json")


class InputError(Exception):
    """Something given to the program is wrong. The message is one line: where, what, what to do."""


def exit_cleanly(main: Callable[[], None]) -> None:
    """Run `main`; an InputError becomes one line on stderr and exit status 1."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")


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
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def run_stage(name: str, main: Callable[[], None]) -> None:
    """Run the stage `name`, then write its time and peak memory into metrics/cost.json.

    So is the machine that it ran on: the file is a record, not a reproducible result.
    """
    start = time.perf_counter()
    exit_cleanly(main)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, see getrusage(2) there
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        costs = json.loads(COST.read_text())
    except (OSError, ValueError):
        costs = {}
    costs.pop("machine", None)
    costs[name] = {"seconds": round(time.perf_counter() - start, 1), "peak_mib": peak // 2**20}
    write_json(COST, costs | {"machine": machine()})
