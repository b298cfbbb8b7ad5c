"""Print accuracies, gain and changed settings of the last commit and of its experiments."""

from pathlib import Path
from typing import Any

import dvc.api
from dvc.utils.flatten import flatten
from tabulate import tabulate

from tools.isolated import git
from transfer.common.errors import exit_cleanly, printable
from transfer.common.settings import MODES

METRICS = [*(f"{mode}.accuracy" for mode in MODES), "gain"]
WIDTHS = [20, None, None, None, 30]  # so that no line is wider than 80 columns


def text(value: Any) -> str:
    """A value as params.yaml has it; DVC gives whole numbers as floats."""
    return f"{value:g}" if isinstance(value, float) else printable(value)


def line(
    name: str, found: dict[str, Any], commit: dict[str, Any], settings: list[str]
) -> list[str]:
    """A line of the table. Until an experiment has ended, DVC gives it the commit's results."""
    results = [(found["State"] or "").lower(), "", ""]
    if results[0] in ("", "success"):
        known = found.get("gain") is not None
        results = (
            [f"{100 * found[key]:.2f}" for key in METRICS] if known else ["no results", "", ""]
        )
    changed = [f"{key}={text(found[key])}" for key in settings if found.get(key) != commit.get(key)]
    return [name, *results, "\n".join(changed)]


def main() -> None:
    settings = [*flatten(dvc.api.params_show())]
    tree, commit, *experiments = dvc.api.exp_show()
    rows = [line("the commit", commit, commit, settings)]
    unfinished = line("working tree", tree, commit, settings)
    if unfinished[1:] != rows[0][1:]:
        rows.append(unfinished)
    experiments.sort(key=lambda found: found.get(METRICS[1]) or 0, reverse=True)
    rows += [line(e["Experiment"] or e["rev"], e, commit, settings) for e in experiments]
    header = ("", *(f"{mode} %" for mode in MODES), "gain", "changed settings")
    right = ("left", "right", "right", "right", "left")
    print(git(Path(), "log", "-1", "--format=Commit %h of %as, and its experiments:").strip())
    print(tabulate(rows, header, disable_numparse=True, colalign=right, maxcolwidths=WIDTHS))


if __name__ == "__main__":
    exit_cleanly(main)
