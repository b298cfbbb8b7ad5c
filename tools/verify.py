"""Run the committed pipeline from scratch in a clone and compare with what was committed.

Exit status: 0 when every output is the committed one, byte for byte, or when only results that
rest on floating-point arithmetic differ and the accuracies agree within the tolerance; 1 when
something else differs; 2 when the comparison could not be made.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from dvc.utils.flatten import flatten
from tabulate import tabulate

from tools.isolated import environment, git
from transfer.common.errors import InputError, exit_cleanly, printable
from transfer.common.files import write_text
from transfer.common.paths import COST, DETAILS, EVALUATION, FIGURES, METRICS

# Their outputs are copied and cut, not computed, so they are the same on every machine.
EXACT = ("download", "network")
HEADLINES = {
    "identical": "Every output is the committed one, byte for byte.",
    "within tolerance": "NOTICE: some bytes differ, as on another kind of CPU; accuracies agree.",
    "different": "The committed results are NOT what the committed code gives.",
}
IDENTICAL, WITHIN, DIFFERENT = HEADLINES


def verify(folder: Path, tolerance: float, scratch: Path) -> tuple[str, str]:
    """Run again, in `scratch`, what is committed in `folder`: the verdict and a report.

    The project may be a subfolder of its repository.
    """
    top, inside = git(folder, "rev-parse", "--show-toplevel", "--show-prefix").splitlines()
    if changes := git(folder, "status", "--porcelain", "--", "."):
        raise InputError(f"{folder}: uncommitted changes; commit or stash them first: {changes}")
    git(folder, "clone", "--quiet", "--no-hardlinks", top, str(scratch / "clone"))
    project = scratch / "clone" / inside
    committed = results(project)
    # What only DVC's cache holds is not in the clone; what Git should hold may not be missing.
    pattern = rf"(?:modified|deleted(?=: +(?:{METRICS}|{FIGURES}))): +(.+)"
    altered = re.findall(pattern, dvc(project, "status", stdout=subprocess.PIPE))
    # Nothing that is committed may pass for a new result.
    git(project, "rm", "-rq", "--ignore-unmatch", "dvc.lock", str(METRICS), str(FIGURES))
    dvc(project, "repro", "--force", "--no-run-cache")
    verdict, report = compare(committed, results(project), altered, tolerance)
    commit = git(folder, "rev-parse", "--short", "HEAD").strip()
    return verdict, f"# Verification of {commit}: {verdict}\n\n{report}"


def dvc(project: Path, *arguments: str, stdout: int | None = None) -> str:
    """Run DVC in `project`, with no cache or settings but its own; it never outlives this call."""
    names = ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DVC_SITE_CACHE_DIR")
    private = dict.fromkeys(names, str(project / ".dvc" / "tmp" / "private"))
    with subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=project, env=environment() | private, stdout=stdout, encoding="utf-8",
    ) as child:  # fmt: skip
        try:
            output, _ = child.communicate()
        except BaseException:
            family = psutil.Process().children(recursive=True)
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=10)
            raise
    if child.returncode:
        raise InputError(f"dvc {arguments[0]} failed in the clone; its own message stands above")
    return output


def results(project: Path) -> list[dict[str, Any]]:
    """The stages in dvc.lock, the metrics and the costs of `project`; all but the stages on
    one level."""
    found = []
    for name in ("dvc.lock", EVALUATION, DETAILS, COST):
        try:  # JSON is YAML
            found.append(dict(yaml.safe_load((project / name).read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            reason = f"{name}: cannot be read: {error!r}; run dvc repro and commit its results"
            raise InputError(reason) from None
    lock, answer, details, cost = found
    return [lock.get("stages", {}), answer | details, flatten(cost)]


def compare(old: list, new: list, altered: list[str], tolerance: float) -> tuple[str, str]:
    """The verdict on two `results`, and a report; what is `altered` does not fit the old lock."""
    (old_stages, old_metrics, old_cost), (stages, metrics, cost) = old, new
    recipes = paired(recipe(old_stages), recipe(stages))
    faults = sorted({*altered, *(name for name, before, after in recipes if before != after)})
    changed = [row for row in paired(old_metrics, metrics) if row[1] != row[2]]
    good = all(agree(*row, tolerance) for row in changed)
    outputs = []
    for name, stage in stages.items():
        for out in stage.get("outs", []):
            fits = out["path"] not in altered
            same = fits and out in old_stages.get(name, {}).get("outs", [])
            excused = fits and good and name not in EXACT
            verdict = IDENTICAL if same else WITHIN if excused else DIFFERENT
            outputs.append((name, out["path"], verdict, cost.get(f"{name}.seconds")))
    verdicts = [DIFFERENT if faults or not good else IDENTICAL, *(row[2] for row in outputs)]
    verdict = max(verdicts, key=list(HEADLINES).index)
    ran_on = paired(machines(old_cost), machines(cost))
    parts = [
        "\n".join([HEADLINES[verdict], *(f"- not as in dvc.lock: {name}" for name in faults)]),
        tabulate(outputs, ("stage", "output", "verdict", "seconds")),
        tabulate(changed, ("metric that differs", "committed", "again"), floatfmt=".9g"),
        tabulate(ran_on, ("machine", "committed on", "verified on")),
    ]
    return verdict, "```text\n" + "\n\n".join(parts) + "\n```\n"


def recipe(stages: dict[str, Any]) -> dict[str, Any]:
    """`stages` of dvc.lock without the hashes of results, which may change from CPU to CPU.

    Of a result there is only its path, wherever it has the hash that its own stage gave it.
    """
    text = json.dumps(stages)
    for stage in stages.values():
        for out in stage.get("outs", []):
            text = text.replace(json.dumps(out), json.dumps(out["path"]))
    return flatten(json.loads(text))


def paired(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Each name with its old and its new value, in the order of `new`."""
    return [(name, old.get(name, "missing"), new.get(name, "missing")) for name in new | old]


def agree(name: str, old: Any, new: Any, tolerance: float) -> bool:
    """Whether the metric `name` may change from `old` to `new`. Most are only shown."""
    limits = {"accuracy": tolerance, "gain": tolerance, "parameters": 0, "trainable": 0}
    kind = name.rpartition(".")[2]
    if not (isinstance(old, int | float) and isinstance(new, int | float)):
        return False
    return kind not in limits or round(abs(new - old), 9) <= limits[kind]


def machines(cost: dict[str, Any]) -> dict[str, str]:
    """What the stages ran on; where that was several machines, one value after the other."""
    found = defaultdict(set)
    for name, value in cost.items():
        _, separator, key = name.rpartition(".machine.")
        if separator:
            found[key].add(str(value))
    return {key: " / ".join(sorted(values)) for key, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--tolerance", type=float, default=0.01, help="on accuracies, default 0.01")
    tolerance = parser.parse_args().tolerance
    with tempfile.TemporaryDirectory(prefix="verify-", ignore_cleanup_errors=True) as scratch:
        verdict, text = verify(Path.cwd(), tolerance, Path(scratch))
    publish(text, Path("verify.md"))
    sys.exit(verdict == DIFFERENT)


def publish(report: str, path: Path) -> None:
    """Print `report`, then keep it at `path`; the verdict stands even if that fails."""
    print(report)
    try:
        write_text(path, report)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)


def refuse(message: str) -> None:
    """Exit with the status that says: not compared."""
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    exit_cleanly(main, refuse)
