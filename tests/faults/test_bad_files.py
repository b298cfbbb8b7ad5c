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
import yaml
from conftest import contents, dvc

from tools.demo import merge
from transfer import params
from transfer.errors import exit_cleanly

ARRAYS = "data/cifar10"
CURVE = "metrics/curves/{}/plots/metrics/{}.tsv"
INPUTS = {
    "download": [f"stripes/{name}" for name in
                 ("data_batch_1", "test_batch", "batches.meta", "MD5SUMS")],
    "backbone": ["weights.pth", "weights.safetensors", f"{ARRAYS}/classes.txt"],
    "train frozen": [f"{ARRAYS}/train_images.npy", f"{ARRAYS}/train_labels.npy",
                     f"{ARRAYS}/classes.txt", f"{ARRAYS}/SHA256SUMS",
                     "models/backbone.safetensors"],
    "evaluate": [f"{ARRAYS}/test_images.npy", f"{ARRAYS}/test_labels.npy",
                 f"{ARRAYS}/classes.txt", f"{ARRAYS}/SHA256SUMS", "models/frozen.safetensors",
                 "models/finetuned.safetensors"],
    "render": [f"{ARRAYS}/test_images.npy", f"{ARRAYS}/test_labels.npy", f"{ARRAYS}/classes.txt",
               "metrics/predictions.csv", CURVE.format("frozen", "train_loss"),
               CURVE.format("finetuned", "validation_accuracy")],
}  # fmt: skip


def flipped(content: bytes) -> bytes:
    """With one bit turned in the middle, or of a list of checksums in each line: the highest bit,
    which no text has.
    """
    lines = content.splitlines(keepends=True) if b"classes.txt" in content else [content]
    return b"".join(
        line[: len(line) // 2] + bytes([line[len(line) // 2] ^ 0x80]) + line[len(line) // 2 + 1 :]
        for line in lines
    )


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
CASES = [
    (stage, path, damage) for stage, paths in INPUTS.items() for path in paths for damage in DAMAGES
]


def test_there_are_cases_enough():
    assert len(CASES) >= 60


@pytest.fixture(scope="module")
def ready(reproduced, tmp_path_factory):
    """A project in which every stage could run, with files of pretrained weights."""
    folder = tmp_path_factory.mktemp("bad") / "project"
    shutil.copytree(reproduced, folder, ignore=shutil.ignore_patterns(".git", "cache"))
    backbone = safetensors.torch.load_file(folder / "models/backbone.safetensors")
    torch.save(backbone, folder / "weights.pth")
    shutil.copy(folder / "models/backbone.safetensors", folder / "weights.safetensors")
    return folder


@pytest.mark.parametrize(("stage", "path", "damage"), CASES)
def test_a_bad_file_is_named_and_nothing_is_written(ready, monkeypatch, stage, path, damage):
    monkeypatch.chdir(ready)
    name, *arguments = stage.split()
    module = importlib.import_module(f"stages.{name}")
    if name == "backbone" and path.startswith("weights"):
        document = yaml.safe_load((ready / "params.yaml").read_text())
        settings = params.Params.model_validate(merge(document, {"model": {"weights": path}}))
        monkeypatch.setattr(params, "load", lambda: settings)
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
    assert bad.stem in message or ("SHA256SUMS" in message and path.startswith(ARRAYS)), message
    assert after == before


def test_a_changed_result_is_noticed_by_dvc_and_made_again(project):
    """A digit for another digit is no damage that a reader could see: DVC's hashes show it."""
    path = project / "metrics/predictions.csv"
    original = path.read_bytes()
    path.write_bytes(original.replace(b"0.", b"1.", 1))
    assert "evaluate" in dvc(project, "status")
    dvc(project, "repro", "evaluate")
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
         f"from pathlib import Path; from transfer import model; "
         f"model.load_state(Path({str(tmp_path / 'weights.pth')!r}))"],
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
