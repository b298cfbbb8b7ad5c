"""How a stage runs: it ends together with DVC, its errors are one line, its cost is recorded."""

import importlib.metadata
import json
import os
import platform
import re
import signal
import socket
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
GRACE = 10  # seconds that a process has to end by itself after a signal
# The variables that choose the instructions that torch, oneDNN and MKL compute with.
INSTRUCTION_SETS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")
# What torchrun sets for each of its processes. Some clusters set a part of it for every process.
TORCHRUN = (
    "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def run_stage(name: str, main: Callable[[], None], torchrun: bool = False) -> None:
    """Run the stage `name`, then record its time, peak memory and machine in metrics/cost.json.

    With `torchrun` this may be one of the processes that torchrun started: then torchrun reports
    the error of the first that fails, and only the first process records.
    """
    several = torchrun and under_torchrun()

    def stage() -> None:
        check_surroundings()
        start = time.perf_counter()
        main()
        if several and os.environ["RANK"] != "0":
            return
        try:
            costs = dict(json.loads(COST.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            costs = {}
        costs[name] = {
            "seconds": round(time.perf_counter() - start, 1),
            "peak_mib": max(memory) // 2**20,
            "machine": machine(),
        }
        write_json(COST, costs)

    memory = [psutil.Process().memory_info().rss]
    arrived, notify = socket.socketpair()
    for end in (arrived, notify):
        end.setblocking(False)
    signal.set_wakeup_fd(notify.fileno())
    threading.Thread(target=watch, args=[memory, arrived], daemon=True).start()
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
    try:
        Path(path).write_text(json.dumps(report), encoding="utf-8")
    except OSError:
        sys.exit(line)
    sys.exit(1)


def watch(memory: list[int], arrived: socket.socket) -> None:
    """Keep in `memory` the most resident memory seen, in bytes; end this process with its DVC.

    Without that, a stage would continue after its `dvc repro` was killed, next to the next one.
    Python's handlers do not run while C code does, which may wait for ever: GRACE seconds after a
    signal has `arrived`, the process ends for good.
    """
    process, dvc = psutil.Process(), find_dvc()
    while dvc is None or _runs(dvc):
        memory[0] = max(memory[0], process.memory_info().rss)
        with suppress(BlockingIOError):
            if arrived.recv(1):
                break
        time.sleep(INTERVAL)
    else:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def find_dvc() -> psutil.Process | None:
    """The DVC that runs this stage, by DVC's own list of locks; None without DVC or such a list.

    Ends this process if that DVC is gone: then another process has adopted this one.
    """
    if "DVC_STAGE" not in os.environ:
        return None
    for _ in range(20):  # DVC may be writing the list just now
        try:
            locks = Path(".dvc/tmp/rwlock").read_text(encoding="utf-8")
        except OSError:
            return None
        holders = {int(pid) for pid in re.findall(r'"pid": (\d+)', locks)}
        for above in psutil.Process().parents():
            if above.pid in holders:
                return above
        time.sleep(INTERVAL)
    print("error: the DVC that started this stage is gone", file=sys.stderr, flush=True)
    os._exit(1)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE  # dead, but its parent has not noticed
    return False


def check_surroundings() -> None:
    """Raise InputError where names of files would be misread, or DVC would lose the experiment."""
    if sys.getfilesystemencoding() != "utf-8":
        raise InputError(
            f"the encoding of file names is {sys.getfilesystemencoding()}, so names of classes "
            "would be misread: set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        )
    if project_root() != Path.cwd():
        refuse_lost_experiment()


def refuse_lost_experiment() -> None:
    """Raise InputError where DVC fails with an experiment in a temporary copy of the project.

    It cannot fetch commits from a shallow clone, nor handle some paths (seen with DVC 3.67).
    """
    root = project_root()
    problem = "DVC loses experiments with --temp or --queue"
    if any((folder / ".git/shallow").exists() for folder in (root, *root.parents)):
        raise InputError(f"{root}: is a shallow clone, in which {problem}: git fetch --unshallow")
    if "%" in str(root) or not str(root).isascii():
        raise InputError(
            f"{root}: has % or letters other than English ones in its path, with which {problem}: "
            "move the project, or run dvc repro or dvc exp run without them"
        )


def machine() -> dict[str, str | int | None]:
    """What the last digits of a floating-point result may depend on, besides the settings."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):  # different models may have the same name
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        facts = dict(re.findall(r"^(cpu family|model|model name)\s*: (.+)$", text, re.M))
        name = facts.pop("model name", cpu)
        cpu = ", ".join([name, *(f"{key} {value}" for key, value in facts.items())])
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
