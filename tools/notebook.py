"""Make docs/exercise.ipynb and, in Spanish, docs/ejercicio.ipynb, and run them.

docs/notebook/ has the text of each cell, and the code that both share. With 5,000 images, it takes
four minutes on two cores.
"""

import argparse
import re
from pathlib import Path

import nbclient
import nbformat
from nbformat import v4

from transfer.run import run_tool

FOLDER = Path(__file__).parents[1] / "docs"
NAMES = ("exercise", "ejercicio")


def parts(path: Path, mark: str) -> dict[str, str]:
    """The parts of a text file, each after a line that `mark` matches with the part's name."""
    _, *found = re.split(f"^{mark}\n", path.read_text(encoding="utf-8"), flags=re.M)
    return {name: text.strip() for name, text in zip(found[::2], found[1::2], strict=True)}


def make(name: str) -> nbformat.NotebookNode:
    """The notebook `name` without outputs: each text, and the code of the same name after it."""
    texts = parts(FOLDER / "notebook" / f"{name}.md", r"<!-- (\w+) -->")
    code = parts(FOLDER / "notebook" / "code.py", r"# %% (\w+)")
    cells = []
    for key, text in texts.items():
        cells.append(v4.new_markdown_cell(text, id=f"{key}-text"))
        if key in code:
            cells.append(v4.new_code_cell(code[key], id=key))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run(notebook: nbformat.NotebookNode) -> None:
    """Execute all cells in place. Raises nbclient's CellExecutionError if one fails."""
    resources = {"metadata": {"path": FOLDER}}
    nbclient.NotebookClient(notebook, resources=resources, record_timing=False).execute()


def main() -> None:
    argparse.ArgumentParser("python -m tools.notebook", description=__doc__).parse_args()
    first = make(NAMES[0])
    run(first)
    code = {cell.id: cell for cell in first.cells if cell.cell_type == "code"}
    for name in NAMES:
        notebook, path = make(name), FOLDER / f"{name}.ipynb"
        # The code is the same in all languages, so it is run once.
        notebook.cells = [code.get(cell.id, cell) for cell in notebook.cells]
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__":
    run_tool(main)
