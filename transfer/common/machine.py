"""The machine: what a result may depend on, and how much memory is free."""

import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path

import psutil
import torch

# The variables that choose the instructions that torch, oneDNN and MKL compute with.
INSTRUCTION_SETS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")


def machine() -> dict[str, str | int | None]:
    """What the last digits of a floating-point result may depend on, beside the settings."""
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


def free_memory() -> int:
    """Bytes that this process may still take: the least that the system, a limit of the process
    (`ulimit -v`) and the limits of its control groups (containers) leave.
    """
    free = [psutil.virtual_memory().available]
    process = psutil.Process()
    if hasattr(process, "rlimit"):  # where psutil can ask for it: Linux, FreeBSD
        soft, _ = process.rlimit(psutil.RLIMIT_AS)
        if soft != psutil.RLIM_INFINITY:
            free.append(soft - process.memory_info().vms)
    return max(0, min([*free, *_left_in_control_groups(Path("/"))]))


def _left_in_control_groups(root: Path) -> list[int]:
    """What the memory limits of this process's control groups leave, versions 1 and 2.

    Each line of /proc/self/cgroup is ID:CONTROLLERS:PATH; every group above PATH limits it, too.
    Pages of the file cache count as used, but can be dropped, so they are added again.
    """
    left = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        for controllers, path in (line.split(":", 2)[1:] for line in lines):
            if controllers not in ("", "memory"):
                continue
            folder = root / "sys/fs/cgroup" / controllers
            names = {
                "": ("memory.max", "memory.current", "inactive_file"),
                "memory": (
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                    "total_inactive_file",
                ),
            }
            most, used, cache = names[controllers]
            for group in (Path(path.lstrip("/")), *Path(path.lstrip("/")).parents):
                with suppress(OSError, ValueError):  # no such file; "max", no limit
                    limit = int((folder / group / most).read_text(encoding="utf-8"))
                    taken = int((folder / group / used).read_text(encoding="utf-8"))
                    stat = (folder / group / "memory.stat").read_text(encoding="utf-8")
                    reclaimable = dict(line.split() for line in stat.splitlines()).get(cache, 0)
                    left.append(limit - taken + int(reclaimable))
    return left
