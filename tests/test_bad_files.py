"""Every input of every stage, damaged in every way: one line that names it, and nothing written."""

import hashlib
import importlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import contents, dvc

from transfer.common.errors import exit_cleanly
from transfer.common.settings import load_params

pytestmark = pytest.mark.faults
ARRAYS = "data/prepared"
CURVE = "metrics/curves/{}/plots/metrics/{}.tsv"
INPUTS = {
    "download": [f"stripes/{name}" for name in
                 ("data_batch_1", "test_batch", "batches.meta", "MD5SUMS")],
    "backbone": ["weights/w.pth", "weights/w.safetensors", f"{ARRAYS}/classes.json"],
    "train frozen": [f"{ARRAYS}/train_images.npy", f"{ARRAYS}/train_labels.npy",
                     f"{ARRAYS}/classes.json", "models/backbone.safetensors"],
    "evaluate": [f"{ARRAYS}/test_images.npy", f"{ARRAYS}/test_labels.npy",
                 f"{ARRAYS}/classes.json", "models/frozen.safetensors",
                 "models/finetuned.safetensors"],
    "render": [f"{ARRAYS}/test_images.npy", f"{ARRAYS}/test_labels.npy", f"{ARRAYS}/classes.json",
               "metrics/predictions.csv", CURVE.format("frozen", "train_loss"),
               CURVE.format("finetuned", "validation_accuracy")],
}  # fmt: skip


def flipped(content: bytes) -> bytes:
    """With the highest bit turned of a byte in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x80]) + content[middle + 1 :]


def misshapen(path, content: bytes) -> bytes:
    """A valid file of its kind that holds something of another shape."""
    if path.suffix == ".npy":
        np.save(path, np.load(path)[:-1])
    elif path.suffix == ".safetensors":
        state = safetensors.torch.load_file(path)
        safetensors.torch.save_file(
            {key: value.flatten()[:1] for key, value in state.items()}, path
        )
    elif path.suffix == ".pth":
        torch.save({key: value.flatten()[:1] for key, value in torch.load(path).items()}, path)
    elif path.suffix in (".csv", ".tsv"):
        lines = content.decode().splitlines()
        path.write_text("\n".join(line.rpartition(lines[0][-1])[0] for line in lines[:9]))
    else:
        path.write_bytes(content.splitlines(keepends=True)[0] * 2)
    return path.read_bytes()


DAMAGES = {
    "missing": None,
    "empty": lambda _, __: b"",
    "truncated": lambda _, content: content[: len(content) // 3],
    "bit flipped": lambda _, content: flipped(content),
    "another type": lambda _, __: b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4,
    "another shape": misshapen,
    "a folder": None,
}
# What passes between stages is guarded by DVC's hashes; a reader cannot see one bit of these.
GUARDED = (".npy", ".safetensors", ".csv", ".tsv")
CASES = [
    (stage, path, damage)
    for stage, paths in INPUTS.items()
    for path in paths
    for damage in DAMAGES
    if damage != "bit flipped" or not path.endswith(GUARDED)
]


def test_there_are_cases_enough():
    assert len(CASES) >= 60


@pytest.fixture(scope="module")
def ready(reproduced, tmp_path_factory):
    """A project in which every stage could run, with files of pretrained weights."""
    folder = tmp_path_factory.mktemp("bad") / "project"
    shutil.copytree(reproduced, folder, ignore=shutil.ignore_patterns(".git", "cache"))
    backbone = safetensors.torch.load_file(folder / "models/backbone.safetensors")
    torch.save(backbone, folder / "weights/w.pth")
    shutil.copy(folder / "models/backbone.safetensors", folder / "weights/w.safetensors")
    return folder


@pytest.mark.parametrize(("stage", "path", "damage"), CASES)
def test_a_bad_file_is_named_and_nothing_is_written(ready, monkeypatch, stage, path, damage):
    monkeypatch.chdir(ready)
    name, *arguments = stage.split()
    module = importlib.import_module(f"stages.{name}")
    if name == "backbone" and path.startswith("weights"):
        changed = load_params().changed({"model": {"weights": path}})
        monkeypatch.setattr(module, "load_params", lambda: changed)
    bad = ready / path
    original = bad.read_bytes()
    try:
        if damage in ("missing", "a folder"):
            bad.unlink()
            if damage == "a folder":
                bad.mkdir()
        else:
            bad.write_bytes(DAMAGES[damage](bad, original))
            assert bad.read_bytes() != original
        before = contents(ready)
        with pytest.raises(SystemExit) as ended:
            exit_cleanly(lambda: module.main(*arguments))
        after = contents(ready)
    finally:
        if bad.is_dir():
            bad.rmdir()
        bad.write_bytes(original)
    message = ended.value.code
    assert message.startswith("error: ")
    assert "\n" not in message
    assert bad.stem in message or (path.startswith(ARRAYS) and ARRAYS in message), message
    assert after == before


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("metrics/predictions.csv", "evaluate"),
        ("data/prepared/test_images.npy", "download"),
        ("models/backbone.safetensors", "backbone"),
        ("models/frozen.safetensors", "train@frozen"),
    ],
)
def test_one_bit_of_a_result_is_noticed_by_dvc_and_made_again(project, name, maker):
    """What a reader could not see: DVC's hashes show it, and the stage makes the same again."""
    path = project / name
    original = path.read_bytes()
    path.unlink()  # it may be a link into DVC's cache
    path.write_bytes(flipped(original))
    assert maker in dvc(project, "status", maker)
    dvc(project, "repro", maker)
    assert path.read_bytes() == original


def test_a_pickle_that_would_run_code_does_not(ready, tmp_path, monkeypatch):
    """Whatever comes as pretrained weights or as CIFAR-10's batches, its code is never run."""
    trap = f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n"

    class Trap:
        def __reduce__(self):
            return exec, (trap,)

    torch.save({"features.0.0.weight": Trap()}, tmp_path / "weights.pth")
    done = subprocess.run(
        [sys.executable, "-c",
         f"from pathlib import Path; from transfer.pretrained import read_state_dict; "
         f"read_state_dict(Path({str(tmp_path / 'weights.pth')!r}))"],
        cwd=ready, text=True, capture_output=True,
    )  # fmt: skip
    assert "InputError" in done.stderr
    torch.save(Trap(), tmp_path / "batch")
    monkeypatch.chdir(ready)
    good = (ready / "stripes/test_batch").read_bytes()
    (ready / "stripes/test_batch").write_bytes((tmp_path / "batch").read_bytes())
    try:
        from stages import download

        with pytest.raises(SystemExit, match="test_batch: is damaged"):
            exit_cleanly(download.main)
    finally:
        (ready / "stripes/test_batch").write_bytes(good)
    assert hashlib.md5(good).hexdigest() in (ready / "stripes/MD5SUMS").read_text()
    assert not (tmp_path / "sprung").exists()
