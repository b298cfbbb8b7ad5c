"""The notebooks run from top to bottom, and are those of their sources."""

import pickle

import nbformat
import pytest
import torch
from nbformat import v4

from tools.demo import striped
from tools.notebook import FOLDER, NAMES, make, run
from transfer.model import classifier

# The images are generated, so they have not the checksums of CIFAR-10's.
ACCEPT = "import torchvision.datasets.cifar as c; c.check_integrity = lambda *arguments: True"


@pytest.mark.faults
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_on_few_images_and_generated_weights(name, tmp_path, monkeypatch):
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    files = {f"data_batch_{number}": 30 for number in range(1, 6)} | {"test_batch": 100}
    for seed, (file, count) in enumerate(files.items()):
        images, labels = striped(count, seed)
        content = {"data": images.transpose(0, 3, 1, 2).reshape(count, -1), "labels": [*labels]}
        (batches / file).write_bytes(pickle.dumps(content))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": [*"abcdefghij"]}))
    features = classifier("mobilenet_v3_small").features.state_dict(prefix="features.")
    torch.save(features, tmp_path / "mobilenet_v3_small-IMAGENET1K_V1-features.pth")
    monkeypatch.setenv("ASSETS_DIR", str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # set by transfer.figures

    notebook = make(name)
    setup = next(cell for cell in notebook.cells if cell.cell_type == "code")
    full = "IMAGES, SIZE, EPOCHS = 5000, 64, 8"
    assert full in setup.source
    setup.source = setup.source.replace(full, "IMAGES, SIZE, EPOCHS = 100, 32, 1")
    notebook.cells.insert(0, v4.new_code_cell(ACCEPT))
    run(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("corrected" in output.get("text", "") for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_notebook_is_that_of_its_sources(name):
    committed = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    wanted = make(name)
    assert [cell.source for cell in committed.cells] == [cell.source for cell in wanted.cells]
    assert all(cell.outputs for cell in committed.cells if cell.id == "comparison")
