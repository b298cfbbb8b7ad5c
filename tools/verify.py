"""Run the committed pipeline from scratch in a clone and compare with what was committed.

Exit status: 0 when every output is the committed one, byte for byte, or when only results that
rest on floating-point arithmetic differ and the accuracies stay within the tolerance; 1 when
something else differs; 2 when the comparison could not be made.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import yaml

from tools.demo import environment
from transfer.command import COST, machine
from transfer.errors import InputError
from transfer.files import write_json, write_text

METRICS = "metrics/evaluation.json"
# Their outputs are copied and cut, not computed, so they are the same on every machine.
EXACT = ("download", "backbone")
IDENTICAL, WITHIN, DIFFERENT = "identical", "within tolerance", "different"


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, text=True, capture_output=True)
    if done.returncode:
        raise InputError(f"git {arguments[0]} in {folder}: {done.stderr.strip()}")
    return done.stdout


def committed_root(folder: Path) -> Path:
    """The root of the Git repository around `folder`, if all of it is committed."""
    root = Path(git(folder, "rev-parse", "--show-toplevel").strip())
    if changes := git(root, "status", "--porcelain"):
        raise InputError(f"{root}: uncommitted changes; commit or stash them first:\n{changes}")
    if not git(root, "ls-files", "dvc.lock"):
        raise InputError(f"{root / 'dvc.lock'}: is not committed; run make repro and commit it")
    return root


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; run make repro and commit its results") from None


def read_lock(folder: Path) -> dict[str, dict]:
    try:
        return yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise InputError(f"{folder / 'dvc.lock'}: is no lock file of DVC: {error!r}") from None


@contextmanager
def dvc(clone: Path, *arguments: str, **popen):
    """DVC in `clone` as a child process that never outlives this one; no cache but the clone's."""
    private = {
        name: str(clone.parent / "dvc")
        for name in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DVC_SITE_CACHE_DIR")
    }
    assets = os.environ.get("ASSETS_DIR")
    private |= {"ASSETS_DIR": str(Path(assets).resolve())} if assets else {}
    child = subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=clone, env=environment() | private, text=True, start_new_session=True, **popen,
    )  # fmt: skip
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def broken_promises(clone: Path, lock: dict[str, dict]) -> list[str]:
    """Where dvc.lock does not fit the committed files, or itself: no run is needed to see it."""
    with dvc(clone, "status", "--json", stdout=subprocess.PIPE) as child:
        status = json.loads(child.communicate()[0] or "{}")
    changes = [
        (stage, what, path, state)
        for stage, entries in status.items()
        for entry in entries
        for what, paths in (entry if isinstance(entry, dict) else {entry: {"": ""}}).items()
        for path, state in paths.items()
    ]
    # DVC's cache is not in the clone, so neither are the outputs that it keeps: no fault.
    cached = {path for *_, path, state in changes if state == "not in cache"}
    found = [
        f"{stage}: {what}: {path} {state}".rstrip()
        for stage, what, path, state in changes
        if not cached & {path, *map(str, Path(path).parents)}
    ]
    made = {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}
    for stage, entry in lock.items():
        found += [
            f"{stage}: dvc.lock gives {dep['path']} two hashes, as a result and as a dependency"
            for dep in entry.get("deps", [])
            if made.get(dep["path"], dep["md5"]) != dep["md5"]
        ]
    return found


def compare_metrics(old: dict, new: dict, tolerance: float) -> tuple[list[dict], bool]:
    """Each metric's old and new value; and whether the accuracies are within `tolerance`.

    Counts of parameters must be equal. Losses, calibration and single classes are only shown.
    """
    rows, good = [], old.keys() == new.keys()
    for name in old.keys() & new.keys():
        difference = new[name] - old[name]
        rows.append({"metric": name, "old": old[name], "new": new[name], "difference": difference})
        if name == "gain" or name.endswith(".accuracy"):
            good &= abs(difference) <= tolerance
        elif name.endswith((".parameters", ".trainable")):
            good &= difference == 0
    return sorted(rows, key=lambda row: list(old).index(row["metric"])), good


def verify(folder: Path, stage: str | None, tolerance: float, clone: Path) -> dict:
    """Clone, run from scratch, compare; returns the certificate."""
    root = committed_root(folder)
    git(root, "clone", "--quiet", "--no-hardlinks", str(root), str(clone))
    lock = read_lock(clone)
    if stage and stage not in lock:
        raise InputError(f"--stage {stage}: dvc.lock has {', '.join(lock)}")
    old_metrics = read_json(clone / METRICS)
    committed_on = read_json(clone / COST).get("machine")
    (clone / COST).unlink()  # so that it lists only what runs now
    faults = broken_promises(clone, lock)

    with dvc(clone, "repro", "--force", "--no-run-cache", *([stage] if stage else [])) as child:
        if child.wait():
            raise InputError("the pipeline failed in the clone; its own message stands above")

    new_lock, cost = read_lock(clone), read_json(clone / COST)
    ran = [name for name in cost if name in new_lock]
    metrics, good = [], False
    if "evaluate" in ran:
        metrics, good = compare_metrics(old_metrics, read_json(clone / METRICS), tolerance)
    outputs = []
    for name in ran:
        old = {out["path"]: out["md5"] for out in lock.get(name, {}).get("outs", [])}
        for out in new_lock[name]["outs"]:
            excused = WITHIN if good and name not in EXACT else DIFFERENT
            verdict = IDENTICAL if old.get(out["path"]) == out["md5"] else excused
            outputs.append(
                {
                    "stage": name,
                    "output": out["path"],
                    "verdict": verdict,
                    "seconds": cost[name]["seconds"],
                }
            )
    verdicts = {output["verdict"] for output in outputs} | ({DIFFERENT} if faults else set())
    return {
        "verdict": next(v for v in (DIFFERENT, WITHIN, IDENTICAL) if v in verdicts),
        "commit": git(root, "rev-parse", "HEAD").strip(),
        "tolerance": tolerance,
        "faults": faults,
        "outputs": outputs,
        "metrics": metrics,
        "committed_on": committed_on,
        "verified_on": machine(),
    }


HEADLINE = {
    IDENTICAL: "Every output that was made again is the committed one, byte for byte.",
    WITHIN: (
        "NOTICE: some bytes differ, as on another kind of CPU or with other package versions; "
        "every accuracy is within {tolerance} of the committed one."
    ),
    DIFFERENT: "The committed results are NOT what the committed code gives.",
}


def report(certificate: dict) -> str:
    """The certificate as Markdown that also reads well in a terminal."""

    def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
        lines = [header, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [
            " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        ]
        rule = "-|-".join("-" * width for width in widths)
        return [f"| {line} |" for line in (padded[0], rule, *padded[1:])]

    outputs = [
        (o["stage"], o["output"], o["verdict"], f"{o['seconds']:.1f}")
        for o in certificate["outputs"]
    ]
    metrics = [
        (m["metric"], *(f"{m[key]:.6g}" for key in ("old", "new", "difference")))
        for m in certificate["metrics"]
    ]
    machines = [
        (key, str((certificate["committed_on"] or {}).get(key)), str(value))
        for key, value in certificate["verified_on"].items()
    ]
    return "\n".join(
        [
            f"# Verification of {certificate['commit'][:10]}: {certificate['verdict']}",
            "",
            HEADLINE[certificate["verdict"]].format(tolerance=certificate["tolerance"]),
            *(f"- {fault}" for fault in certificate["faults"]),
            "",
            *table(("stage", "output", "verdict", "seconds"), outputs),
            "",
            *(table(("metric", "committed", "again", "difference"), metrics) if metrics else []),
            "",
            *table(("machine", "committed on", "verified on"), machines),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", help="run only this stage and those that it needs")
    parser.add_argument("--tolerance", type=float, default=0.01, help="on accuracies, default 0.01")
    parser.add_argument("--keep", action="store_true", help="keep the clone and say where it is")
    options = parser.parse_args()
    # A terminated run must clean up as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    scratch = Path(tempfile.mkdtemp(prefix="verify-"))
    try:
        certificate = verify(Path.cwd(), options.stage, options.tolerance, scratch / "clone")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if options.keep:
            print(f"The clone is kept in {scratch / 'clone'}")
        else:
            shutil.rmtree(scratch)
    text = report(certificate)
    write_json(Path("verify.json"), certificate)
    write_text(Path("verify.md"), text)
    print(text)
    return 1 if certificate["verdict"] == DIFFERENT else 0


if __name__ == "__main__":
    sys.exit(main())
