"""Run the committed pipeline from scratch in a clone and compare with what was committed.

Exit status: 0 when every output is the committed one, byte for byte, or when only results that
rest on floating-point arithmetic differ and the accuracies stay within the tolerance; 1 when
something else differs; 2 when the comparison could not be made.
"""

import argparse
import html
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from tabulate import tabulate

from tools.isolated import environment, git
from transfer.common.errors import InputError, exit_cleanly
from transfer.common.files import write_json, write_text
from transfer.common.run import COST, machine

METRICS = "metrics/evaluation.json"
# Their outputs are copied and cut, not computed, so they are the same on every machine.
EXACT = ("download", "backbone")
IDENTICAL, WITHIN, DIFFERENT = "identical", "within tolerance", "different"
HEADLINE = {
    IDENTICAL: "Every output that was made again is the committed one, byte for byte.",
    WITHIN: (
        "NOTICE: some bytes differ, as on another kind of CPU or with other package versions; "
        "every accuracy is within the tolerance of the committed one."
    ),
    DIFFERENT: "The committed results are NOT what the committed code gives.",
}


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; run dvc repro and commit its results") from None


def read_lock(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "dvc.lock"
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise InputError(f"{path}: is no lock file of DVC: {error!r}") from None


def clone_of(folder: Path, target: Path) -> Path:
    """The project at `folder` in a clone at `target`, if all of it is committed.

    The project may be a subfolder of its repository.
    """
    root = Path(git(folder, "rev-parse", "--show-toplevel").strip())
    if changes := git(folder, "status", "--porcelain", "--", "."):
        raise InputError(f"{folder}: uncommitted changes; commit or stash them first: {changes}")
    if not git(folder, "ls-files", "dvc.lock"):
        raise InputError(f"{folder / 'dvc.lock'}: is not committed; run dvc repro and commit it")
    git(root, "clone", "--quiet", "--no-hardlinks", str(root), str(target))
    return target / git(folder, "rev-parse", "--show-prefix").strip()


def dvc(project: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess:
    """Run DVC in `project`, with no cache or settings but its own; it never outlives this call."""
    names = ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DVC_SITE_CACHE_DIR")
    private = dict.fromkeys(names, str(project / ".dvc" / "tmp" / "private"))
    with psutil.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=project, env=environment() | private, encoding="utf-8", **options,
    ) as child:  # fmt: skip
        try:
            output, _ = child.communicate()
        except BaseException:
            family = [*child.children(recursive=True), child]
            for process in family:
                process.kill()
            psutil.wait_procs(family)
            raise
    return subprocess.CompletedProcess(arguments, child.returncode, output)


def contradictions(project: Path, lock: dict[str, dict[str, Any]]) -> list[str]:
    """Where dvc.lock does not fit the committed files, or itself: no run is needed to see it."""
    status = json.loads(dvc(project, "status", "--json", stdout=subprocess.PIPE).stdout or "{}")
    found = [
        f"{stage}: {what}: {path} {state}".rstrip()
        for stage, entries in status.items()
        for entry in entries
        for what, paths in (entry if isinstance(entry, dict) else {entry: {"": ""}}).items()
        for path, state in paths.items()
        if state not in ("deleted", "not in cache")  # a clone has no cache
    ]
    made = {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}
    return found + [
        f"{stage}: dvc.lock gives {dep['path']} two hashes, as a result and as a dependency"
        for stage, entry in lock.items()
        for dep in entry.get("deps", [])
        if made.get(dep["path"], dep["md5"]) != dep["md5"]
    ]


def within(metrics: dict[str, dict[str, float]], tolerance: float) -> bool:
    """Whether the accuracies, each an "old" and a "new" value, agree within `tolerance`.

    Counts of parameters must be equal. Losses, calibration and single classes are only shown.
    """
    for name, values in metrics.items():
        exact = name.endswith((".parameters", ".trainable"))
        allowed = 0 if exact else tolerance
        if not {"old", "new"} <= values.keys():
            return False
        compared = exact or name == "gain" or name.endswith(".accuracy")
        is_class = name.startswith("recall.")
        if compared and not is_class and abs(values["new"] - values["old"]) > allowed:
            return False
    return True


def verify(folder: Path, stage: str | None, tolerance: float, scratch: Path) -> dict[str, Any]:
    """Clone, run from scratch, compare; returns the certificate."""
    project = clone_of(folder, scratch / "clone")
    lock = read_lock(project)
    if stage and stage not in lock:
        raise InputError(f"--stage {stage}: dvc.lock has {', '.join(lock)}")
    committed_on = read_json(project / COST).get("machine") or {}
    (project / COST).unlink()  # so that it lists only what runs now
    faults = contradictions(project, lock)

    if dvc(project, "repro", "--force", "--no-run-cache", *([stage] if stage else [])).returncode:
        raise InputError("the pipeline failed in the clone; its own message stands above")

    new_lock, cost = read_lock(project), read_json(project / COST)
    ran = [name for name in cost if name in new_lock]
    metrics: dict[str, dict[str, float]] = {}
    if "evaluate" in ran:
        diff = dvc(project, "metrics", "diff", "--all", "--json", "HEAD", stdout=subprocess.PIPE)
        metrics = json.loads(diff.stdout)[METRICS]
    good = bool(metrics) and within(metrics, tolerance)
    outputs = []
    for name in ran:
        old = {out["path"]: out["md5"] for out in lock.get(name, {}).get("outs", [])}
        excused = WITHIN if good and name not in EXACT else DIFFERENT
        for out in new_lock[name]["outs"]:
            verdict = IDENTICAL if old.get(out["path"]) == out["md5"] else excused
            outputs.append({"stage": name, "output": out["path"], "verdict": verdict})
    verdicts = {output["verdict"] for output in outputs} | ({DIFFERENT} if faults else set())
    return {
        "verdict": next(v for v in (DIFFERENT, WITHIN, IDENTICAL) if v in verdicts),
        "commit": git(folder, "rev-parse", "HEAD").strip(),
        "tolerance": tolerance,
        "faults": faults,
        "outputs": outputs,
        "seconds": {name: cost[name]["seconds"] for name in ran},
        "metrics": metrics,
        "committed_on": committed_on,
        "verified_on": machine(),
    }


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown; names of the user's (classes) are not interpreted."""
    escaped = [
        [html.escape(str(cell), quote=False).replace("|", r"\|") for cell in r] for r in rows
    ]
    return tabulate(escaped, header, "github", disable_numparse=True) + "\n"


def report(certificate: dict[str, Any]) -> str:
    """The certificate as Markdown that also reads well in a terminal."""
    c = certificate
    seconds = c["seconds"]
    outputs = [
        (o["stage"], o["output"], o["verdict"], f"{seconds[o['stage']]:.1f}") for o in c["outputs"]
    ]
    metrics = [
        (name, *(f"{values.get(key, float('nan')):.6g}" for key in ("old", "new", "diff")))
        for name, values in c["metrics"].items()
    ]
    machines = [(key, c["committed_on"].get(key), value) for key, value in c["verified_on"].items()]
    parts = [
        f"# Verification of {c['commit'][:10]}: {c['verdict']}\n",
        "\n".join([HEADLINE[c["verdict"]], *(f"- {html.escape(fault)}" for fault in c["faults"])]),
        "",
        table(("stage", "output", "verdict", "seconds"), outputs),
        table(("metric", "committed", "again", "difference"), metrics) if metrics else "",
        table(("machine", "committed on", "verified on"), machines),
    ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--stage", help="run only this stage and those that it needs")
    parser.add_argument("--tolerance", type=float, default=0.01, help="on accuracies, default 0.01")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="verify-", ignore_cleanup_errors=True) as scratch:
        try:
            certificate = verify(Path.cwd(), options.stage, options.tolerance, Path(scratch))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    text = report(certificate)
    write_json(Path("verify.json"), certificate)
    write_text(Path("verify.md"), text)
    print(text)
    sys.exit(certificate["verdict"] == DIFFERENT)


if __name__ == "__main__":
    exit_cleanly(main)
