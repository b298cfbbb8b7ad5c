"""What every stage and tool shares: paths, errors in one line, device, cost, files."""

import argparse
import csv
import ctypes
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from transfer.settings import InputError

PREPARED, METRICS, FIGURES = Path("data/prepared"), Path("metrics"), Path("figures")
COST = METRICS / "cost.json"
OFFLINE = "without internet access, set ASSETS_DIR (docs/troubleshooting.md) or run make demo"
# DVC runs experiments with --temp or --queue in copies at PROJECT/.dvc/tmp/exps/.
PROJECT = Path(str(Path.cwd()).split(os.sep + os.path.join(".dvc", "tmp", "exps"))[0])


def model_path(name: str) -> Path:
    """The model `new`, with an untrained head, or that of a mode."""
    return Path("models", f"{name}.safetensors")


def assets_dir() -> Path | None:
    """The folder that ASSETS_DIR names, if it is set; a relative path is taken from the project."""
    value = os.environ.get("ASSETS_DIR")
    return PROJECT / Path(value).expanduser() if value else None


def run_tool(main: Callable[[], object]) -> None:
    """Run `main`. An error that the user can correct is one line, without a traceback."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:  # OSError: a missing file, no permission, a full disk
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")


def run_stage(name: str, main: Callable[..., object], modes: Sequence[str] = ()) -> None:
    """Run `main`, with the mode on the command line if there are `modes`, then record its time and
    machine in metrics/cost.json.
    """
    parser = argparse.ArgumentParser(
        f"python -m stages.{name}",
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    if modes:
        parser.add_argument("mode", choices=modes)
    given = vars(parser.parse_args()).values()
    start = time.perf_counter()
    run_tool(lambda: main(*given))
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0":
        return  # of the processes that torchrun started, the first one records
    seconds = round(time.perf_counter() - start, 1)
    costs: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        costs = json.loads(COST.read_text(encoding="utf-8"))
    costs["@".join([name, *given])] = {"seconds": seconds, "machine": machine()}
    write_json(COST, costs)


def set_up_torch(device: str, threads: int) -> torch.device:
    """The device that `train.device` names; sets what torch's results and speed depend on."""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device not in ("auto", "cpu", found.type):
        raise InputError(f"train.device = {device}: torch finds only {found.type}; use auto or cpu")
    torch.set_num_threads(threads)  # floating-point sums depend on it
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # its 10 bits are too few to check a folded backbone
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        # glibc gives large blocks back to the system at once and clears them for the next step.
        # Keeping them makes a step about twice as fast.
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, see mallopt(3)
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return torch.device("cpu") if device == "cpu" else torch.device(found.type)


def machine() -> dict[str, str | int | None]:
    """What the last digits of a floating-point result may depend on, besides the settings."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):  # CPU models with the same name have different numbers
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        facts = dict(re.findall(r"^(cpu family|model|model name)\s*: (.+)$", text, re.M))
        cpu = ", ".join([facts.pop("model name", cpu), *map(" ".join, facts.items())])
    # These choose the instructions that torch, oneDNN and MKL compute with.
    variables = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")
    return {
        "cpu": cpu,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ[name] for name in variables if name in os.environ},
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "torchvision", "numpy", "dvc")},
    }


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows`, which all have the same keys, with a header line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
