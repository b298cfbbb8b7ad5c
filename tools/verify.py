"""Run the committed pipeline from scratch in a clone, and compare with what was committed.

Exit status 0: every output has the committed bytes, or only floating-point results differ, as on
another model of CPU, and the accuracies agree within --tolerance; 1: something else differs; 2: the
comparison could not be made.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from transfer.run import COST, METRICS

DVC = (sys.executable, "-m", "dvc")
EXACT = ("download", "network")  # copied and cut, not computed: the same on every machine
VERDICTS = {
    "identical": "Every output has the committed bytes.",
    "within tolerance": "Floating-point results differ, as on another CPU; the accuracies agree.",
    "different": "The committed results are not those of the committed code.",
}


def run(folder: Path, *command: str) -> str:
    """What `command` prints. Raises CalledProcessError if it fails."""
    pipe = subprocess.PIPE
    return subprocess.run(command, cwd=folder, check=True, stdout=pipe, encoding="utf-8").stdout


def read(clone: Path) -> tuple[dict, dict[str, float]]:
    """The stages in dvc.lock, and the answer."""
    lock = yaml.safe_load((clone / "dvc.lock").read_text(encoding="utf-8"))
    answer = (clone / METRICS / "evaluation.json").read_text(encoding="utf-8")
    return lock["stages"], json.loads(answer)


def recipe(stages: dict) -> dict:
    """The stages without the hashes of computed results, which depend on the CPU."""
    text = json.dumps(stages)
    for out in (o for name in stages.keys() - EXACT for o in stages[name].get("outs", [])):
        # Where a result has the hash that its own stage gave it, only its path remains.
        text = text.replace(json.dumps(out), json.dumps(out["path"]))
    return json.loads(text)


def verify(project: Path, clone: Path, tolerance: float) -> str:
    """Run the last commit of `project` in `clone` and print what differs; one of VERDICTS."""
    if changes := run(project, "git", "status", "--porcelain"):
        raise ValueError(f"uncommitted changes; commit or stash them first:\n{changes}")
    run(project, "git", "clone", "--quiet", str(project), str(clone))
    # Data that .dvc files track come from the project's cache.
    if tracked := run(project, "git", "ls-files", "*.dvc").split("\n")[:-1]:
        cache = run(project, *DVC, "cache", "dir").strip()
        run(clone, *DVC, "remote", "add", "--local", "project", cache)
        run(clone, *DVC, "pull", "--remote", "project", *tracked)
    old_stages, old = read(clone)
    subprocess.run([*DVC, "repro", "--force", "--no-run-cache"], cwd=clone, check=True)
    stages, new = read(clone)

    all_but_cost = ("--", ".", f":!{COST.as_posix()}")
    print(run(clone, "git", "diff", "--stat", *all_but_cost))
    print(run(clone, *DVC, "metrics", "diff"))
    if old_stages == stages:  # then a committed file that differs was edited
        changed = run(clone, "git", "status", "--porcelain", *all_but_cost)
        return "different" if changed else "identical"
    close = old.keys() == new.keys() and all(abs(new[k] - old[k]) < tolerance + 1e-9 for k in old)
    return "within tolerance" if close and recipe(old_stages) == recipe(stages) else "different"


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.verify", description=__doc__)
    parser.add_argument("--tolerance", type=float, default=0.01, help="of accuracies: 0.01")
    tolerance = parser.parse_args().tolerance
    with tempfile.TemporaryDirectory(prefix="verify-", ignore_cleanup_errors=True) as folder:
        try:
            verdict = verify(Path.cwd(), Path(folder, "clone"), tolerance)
        except Exception as error:  # whatever it is, there is no verdict
            print(f"error: cannot be compared: {error}", file=sys.stderr)
            sys.exit(2)
    print(f"{verdict.upper()}: {VERDICTS[verdict]}")
    sys.exit(verdict == "different")


if __name__ == "__main__":
    main()
