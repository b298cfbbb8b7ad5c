"""Accuracies against one setting, from experiments named NAME-1, NAME-2, ... that have run.

`python -m tools.sweep NAME SETTING` prints the table and writes docs/NAME.csv, and of the setting
model.blocks also docs/NAME.png. `make seeds` and `make sweep` run experiments and this.
"""

import sys
from pathlib import Path

import dvc.api
from tabulate import tabulate

from transfer import figures
from transfer.common.errors import InputError, exit_cleanly
from transfer.common.files import write_csv
from transfer.common.params import MODES

FOLDER = Path("docs")
RESULTS = [*(f"{mode}.accuracy" for mode in MODES), "gain"]


def main(name: str, setting: str) -> None:
    found = {
        int(row[setting]): {result: row[result] for result in RESULTS}
        for row in dvc.api.exp_show()
        if (row["Experiment"] or "").startswith(f"{name}-") and row.get("gain") is not None
    }
    if not found:
        raise InputError(f"there is no experiment {name}-1 with results; see the Makefile")
    values = sorted(found)
    write_csv(FOLDER / f"{name}.csv", [{setting: value} | found[value] for value in values])
    if setting == "model.blocks":
        accuracy = {mode: [found[b][f"{mode}.accuracy"] for b in values] for mode in MODES}
        figures.save(figures.accuracy_by_blocks(values, accuracy), FOLDER / f"{name}.png")
    rows = [(value, *found[value].values()) for value in values]
    print(tabulate(rows, (setting, *MODES, "gain"), floatfmt=".2%"))


if __name__ == "__main__":
    exit_cleanly(lambda: main(*sys.argv[1:]))
