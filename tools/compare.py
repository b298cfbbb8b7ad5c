"""Print accuracies, gain and changed settings of the last commit and of its experiments.

Below each of them stand the settings that differ from the commit, as `-S` takes them.
"""

from pathlib import Path
from typing import Any

import dvc.api
from dvc.utils.flatten import flatten
from tabulate import tabulate

from tools.isolated import git
from transfer.common.errors import exit_cleanly, printable
from transfer.common.settings import MODES

METRICS = [*(f"{mode}.accuracy" for mode in MODES), "gain"]


def shown(value: Any) -> str:
    """A value as params.yaml has it; DVC gives whole numbers as floats, and null as text."""
    text = f"{value:.12g}" if isinstance(value, float) else printable(value)
    return "null" if text == "None" else text


def unfinished(found: dict[str, Any]) -> str:
    """Why an experiment, as DVC lists it, has no results of its own; "" if it has them.

    Until it has ended, DVC lists it with the results of the last commit.
    """
    if found["State"] not in (None, "", "Success"):
        return found["State"]
    return "" if found.get("gain") is not None else "has no results"


def results(found: dict[str, Any]) -> list[str]:
    """Accuracies and gain in %, or why there are none."""
    if reason := unfinished(found):
        return [reason, "", ""]
    return [f"{100 * found[key]:.2f}" for key in METRICS]


def main() -> None:
    settings = [*flatten(dvc.api.params_show())]
    tree, commit, *experiments = dvc.api.exp_show()

    def changes(found: dict[str, Any]) -> list[str]:
        changed = [key for key in settings if found.get(key) != commit.get(key)]
        return [f"    {key}={shown(found.get(key))}" for key in changed]

    experiments.sort(key=lambda found: found.get(METRICS[1]) or 0, reverse=True)
    rows = {"the commit": commit}
    if changes(tree) or results(tree) != results(commit):
        rows["working tree"] = tree
    rows |= {found["Experiment"] or found["rev"]: found for found in experiments}
    header = ("", *(f"{mode} %" for mode in MODES), "gain")
    table = [(name, *results(found)) for name, found in rows.items()]
    lines = tabulate(table, header, disable_numparse=True, colalign=("left", *["right"] * 3))
    top, rule, *body = lines.splitlines()
    print(git(Path(), "log", "-1", "--format=Commit %h of %as, and its experiments:").strip())
    print(top, rule, sep="\n")
    for line, found in zip(body, rows.values(), strict=True):
        print(line, *changes(found), sep="\n")


if __name__ == "__main__":
    exit_cleanly(main)
