"""Every input of every stage, damaged in every way: one line that names it, and nothing written."""

import importlib
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import contents, dvc, ran, set_params
from safetensors.torch import load_file, save_file
from test_sources import make_official

from transfer.common.errors import exit_cleanly
from transfer.common.paths import PREDICTIONS, PREPARED, curves_path, model_path
from transfer.model import classifier, cut

pytestmark = pytest.mark.faults
BATCHES, CLASSES = Path("cifar-10-batches-py"), PREPARED / "classes.json"
TRAIN, TEST = ([PREPARED / f"{name}_{kind}.npy" for kind in ("images", "labels")] + [CLASSES]
               for name in ("train", "test"))  # fmt: skip
INPUTS = {
    "download": [BATCHES / "data_batch_1", BATCHES / "test_batch", BATCHES / "batches.meta",
                 Path("stripes/train/bird/00002.png")],
    "network": [Path("weights/w.pth"), Path("weights/w.safetensors"), CLASSES],
    "train": [*TRAIN, model_path("new")],
    "evaluate": [*TEST, model_path("frozen"), model_path("finetuned")],
    "render": [*TEST, PREDICTIONS, curves_path("frozen"), curves_path("finetuned")],
}  # fmt: skip
CASES = [(name, path) for name, paths in INPUTS.items() for path in paths]


def flip(path: Path) -> None:
    """Turn the highest bit of a byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def reshape(path: Path) -> None:
    """Write a file of the same kind that holds something of another shape."""
    if path.suffix == ".npy":
        np.save(path, np.load(path)[..., None])
    elif path.suffix in (".pth", ".safetensors"):
        load, save = (torch.load, torch.save) if path.suffix == ".pth" else (load_file, save_file)
        save({key: value.flatten()[:1] for key, value in load(path).items()}, path)
    else:
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] * 2)


class Trap:  # when it is unpickled, it makes a file
    def __reduce__(self):
        return open, ("sprung", "w")


DAMAGES = {  # and of which files no reader can see it
    "missing": (Path.unlink, [".png"]),
    "empty": (lambda path: path.write_bytes(b""), []),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 3), []),
    "cut by a byte": (lambda path: os.truncate(path, path.stat().st_size - 1), [".png", ".json"]),
    "bit flipped": (flip, [".npy", ".safetensors", ".csv"]),
    "another type": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(999)), []),
    "another shape": (reshape, [".png"]),
    "a folder": (lambda path: path.unlink() or path.mkdir(), [".png"]),
    "a trap": (lambda path: path.write_bytes(pickle.dumps(Trap(), 2)), []),
}


@pytest.mark.parametrize(("name", "path"), CASES, ids=str)
def test_a_bad_file_is_named_and_nothing_is_written(project, monkeypatch, name, path):
    monkeypatch.chdir(project)
    make_official(project, monkeypatch)
    state = cut(classifier("mobilenet_v3_small"), 5).state_dict()
    save_file(state, "weights/w.safetensors")
    torch.save(state, "weights/w.pth")
    source = "official.md5" if BATCHES in path.parents else "stripes"
    model = {"weights": path.as_posix() if path.stem == "w" else None}
    train = {"threads": 1, "frozen": {"epochs": 1}}
    set_params(project, {"data": {"source": source}, "model": model, "train": train})
    main, mode = importlib.import_module(f"stages.{name}").main, ["frozen"] * (name == "train")
    main(*mode)  # without damage, it runs
    original = path.read_bytes()
    for damage, (do, unseen) in DAMAGES.items():
        if path.suffix not in unseen:
            do(path)
            before = contents(project)
            with pytest.raises(SystemExit) as ended:
                exit_cleanly(lambda: main(*mode))
            assert re.fullmatch(f"error: .*({path.stem}|{PREPARED}).*", ended.value.code), damage
            assert contents(project) == before, damage
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
            path.write_bytes(original)


def test_one_bit_of_a_result_is_noticed_by_dvc_and_made_again(project):
    """What a reader could not see: DVC's hashes show it, and the stages make the same again."""
    models = (model_path("new"), model_path("frozen"))
    results = [project / path for path in (TEST[0], *models, PREDICTIONS)]
    before = [path.read_bytes() for path in results]
    for path in results:
        flip(path)
    assert ran(dvc(project, "repro")) == ["download", "network", "train@frozen", "evaluate"]
    assert [path.read_bytes() for path in results] == before
