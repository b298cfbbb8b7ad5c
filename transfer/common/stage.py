"""How a stage runs: it ends with DVC, its errors are one line, its cost is written down."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from transfer.common.errors import InputError, exit_cleanly, is_first_process
from transfer.common.files import project_root, write_json
from transfer.common.machine import machine

COST = Path("metrics/cost.json")
INTERVAL = 0.1  # seconds between two looks at memory and at DVC


def run_stage(name: str, main: Callable[[], None]) -> None:
    """Run the stage `name`, then write its time and peak memory into metrics/cost.json.

    So is the machine that it ran on: the file is a record, not a reproducible result.
    """

    def stage() -> None:
        refuse_shallow_clone()
        start = time.perf_counter()
        main()
        if not is_first_process():
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
    exit_cleanly(stage)


def watch(memory: list[int]) -> None:
    """Keep in `memory` the most resident memory seen, in bytes; end this process with its DVC.

    Without that, a stage would continue after its `dvc repro` was killed, beside the next one.
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


def refuse_shallow_clone() -> None:
    """Raise InputError in an experiment that DVC runs in a temporary copy of a shallow clone.

    DVC would lose it at its end: it cannot fetch commits from a shallow clone.
    """
    root = project_root()
    if root == Path.cwd():
        return
    asked = ["git", "rev-parse", "--is-shallow-repository"]
    outside = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    with suppress(OSError):
        done = subprocess.run(
            asked, cwd=root, env=outside, encoding="utf-8", stdout=subprocess.PIPE
        )
        if done.stdout.strip() == "true":
            raise InputError(
                f"{root}: is a shallow clone, in which DVC loses experiments with --temp or "
                "--queue; run git fetch --unshallow there, or dvc exp run without them"
            )
