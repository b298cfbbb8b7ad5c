"""Accuracy against the number of blocks kept, from the experiments that `make sweep` has run.

Writes docs/blocks.csv and docs/blocks.png and prints the table.
"""

from pathlib import Path

import dvc.api
from tabulate import tabulate

from transfer import figures
from transfer.common.errors import InputError, exit_cleanly
from transfer.common.files import write_csv
from transfer.common.params import MODES

FOLDER = Path("docs")
NAME = "blocks-"  # DVC numbers the experiments of a sweep that is named blocks
RESULTS = [*(f"{mode}.accuracy" for mode in MODES), "gain"]


def main() -> None:
    found = {
        int(row["model.blocks"]): {name: row[name] for name in RESULTS}
        for row in dvc.api.exp_show()
        if (row["Experiment"] or "").startswith(NAME) and row.get("gain") is not None
    }
    if not found:
        raise InputError(f"there is no experiment {NAME}1 with results: run make sweep")
    blocks = sorted(found)
    write_csv(FOLDER / "blocks.csv", [{"model.blocks": b} | found[b] for b in blocks])
    accuracy = {mode: [found[b][f"{mode}.accuracy"] for b in blocks] for mode in MODES}
    figures.save(figures.accuracy_by_blocks(blocks, accuracy), FOLDER / "blocks.png")
    rows = [(b, *found[b].values()) for b in blocks]
    print(tabulate(rows, ("blocks", *MODES, "gain"), floatfmt=".2%"))


if __name__ == "__main__":
    exit_cleanly(main)
