"""Accuracy against the number of blocks kept, from the experiments that `make sweep` has run.

Writes docs/blocks.csv and docs/blocks.png and prints the table.
"""

from pathlib import Path

import dvc.api

from transfer import figures, params
from transfer.description import table
from transfer.errors import InputError, exit_cleanly
from transfer.files import read_csv, write_csv

FOLDER = Path("docs")
NAME = "blocks-"  # DVC numbers the experiments of a sweep that is named blocks
ACCURACIES = [f"{mode}.accuracy" for mode in params.MODES]


def main() -> None:
    found = {
        int(row["model.blocks"]): row | {"model.blocks": int(row["model.blocks"])}
        for row in dvc.api.exp_show()
        if (row["Experiment"] or "").startswith(NAME) and row.get("gain") is not None
    }
    if not found:
        raise InputError(f"there is no experiment {NAME}1 with results: run make sweep")
    names = ["model.blocks", *ACCURACIES, "gain"]
    write_csv(FOLDER / "blocks.csv", [{n: found[b][n] for n in names} for b in sorted(found)])
    columns = read_csv(
        FOLDER / "blocks.csv", {"model.blocks": int, **dict.fromkeys(names[1:], float)}
    )
    figures.save(
        figures.accuracy_by_blocks(
            columns["model.blocks"], {mode: columns[f"{mode}.accuracy"] for mode in params.MODES}
        ),
        FOLDER / "blocks.png",
    )
    cells = [(b, *(f"{v:.2%}" for v in row)) for b, *row in zip(*columns.values(), strict=True)]
    print(table(("blocks", *params.MODES, "gain"), cells))


if __name__ == "__main__":
    exit_cleanly(main)
