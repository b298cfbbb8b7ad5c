"""How a command of this project runs: errors in one line, its cost written down."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

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


def run_stage(name: str, main: Callable[[], None]) -> None:
    """Run the stage `name`, then write its wall time and peak memory into metrics/cost.json."""
    start = time.perf_counter()
    exit_cleanly(main)
    # Kilobytes on Linux, bytes on macOS (getrusage(2) of each).
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    try:
        costs = json.loads(COST.read_text())
    except (OSError, ValueError):
        costs = {}
    costs[name] = {"seconds": round(time.perf_counter() - start, 1), "peak_mib": peak // 2**20}
    write_json(COST, costs)
