"""Troubles of real users, one of each kind: refused by name, or got over."""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
from helpers import (
    ROOT,
    contents,
    dvc,
    python,
    refusal,
    save_image,
    set_params,
    stage,
    start,
    write_cifar10,
)
from torch import nn

from tools.isolated import git
from transfer import figures
from transfer.common.run import check_surroundings
from transfer.common.settings import MODES
from transfer.inference import to_input
from transfer.model import IMAGENET, Network, build, check_blocks, normalisation, save_weights
from transfer.pretrained import pretrained
from transfer.sources.cifar10 import read_cifar10
from transfer.sources.folders import read_folders
from transfer.sources.images import read_image
from transfer.training.loop import train
from transfer.training.modes import make_mode
from transfer.training.temperature import calibrate

linux = pytest.mark.skipif(sys.platform != "linux", reason="seen on Linux")
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
FEATURES = {
    "mean": (0.48235, 0.45882, 0.40784),
    "std": (0.00392156862745098,) * 3,
}


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("resnet18", "IMAGENET1K_V1", IMAGENET),
        ("inception_v3", "IMAGENET1K_V1", HALF),
        ("vgg16", "IMAGENET1K_FEATURES", FEATURES),
        ("vgg16", "weights/mine.pth", IMAGENET),
        ("googlenet", None, IMAGENET),
        ("googlenet", "weights/googlenet-1378be20.pth", HALF),
    ],
)
def test_weights_bring_their_own_normalisation(name, weights, expected):
    assert normalisation(name, weights) == expected


def test_a_model_records_its_normalisation_and_inputs_have_it(params, tmp_path):
    network = Network(build(params.model, 10).backbone, nn.Sequential(), FEATURES)
    save_weights(tmp_path / "w.safetensors", network)
    state = safetensors.torch.load_file(tmp_path / "w.safetensors")
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    x = to_input(images, 8, state["mean"], state["std"])
    wanted = images.permute(0, 3, 1, 2) - 255 * torch.tensor(FEATURES["mean"]).view(3, 1, 1)
    torch.testing.assert_close(x, wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "blocks", "words"),
    [
        ("swin_v2_t", 2, "the number of channels, .* changes with the image size"),
        ("vit_b_32", 3, "forward pass is more than its first 3 blocks"),
        ("vit_b_32", 1, None),
        ("resnet18", None, None),
    ],
)
def test_networks_that_are_more_than_their_blocks_are_refused(params, name, blocks, words):
    settings = {"name": name, "blocks": blocks, "head": "linear", "image_size": 64}
    model = params.changed({"model": settings}).model
    message = refusal(lambda: (check_blocks(model), build(model, 10)))
    assert (message is None) == (words is None), message
    assert not words or re.search(f"model.name = '{name}'.*{words}", message)


def album(root, *folders) -> None:
    """Two classes of four images in each of `folders`."""
    for folder in folders:
        for name in ("apple", "sky"):
            for number in range(4):
                save_image(root / folder / name / f"{number}.png")


@pytest.mark.parametrize(
    ("folders", "sizes", "words"),
    [
        (["Training", "Testing"], (8, 8), "Testing is the test split"),
        (["TRAIN", "validation"], (8, 8), "validation is the test split"),
        (["train", "test", "val"], (8, 8), "ignored, next to the splits: val"),
        (["train"], (4, 4), "has no test split; data.test_share = 0.5 becomes it"),
        (["train", "holdout"], None, "holds holdout, train; take"),
        (["test", "pictures"], None, "holds pictures, test; take"),
        (["train", "training"], None, "holds train, training; take"),
        (["trainset", "testset"], (8, 8), "2 classes: testset, trainset"),
    ],
)
def test_names_of_splits_are_known_said_or_refused(tmp_path, capsys, folders, sizes, words):
    album(tmp_path / "album", *folders)
    results = []
    message = refusal(lambda: results.append(read_folders(tmp_path / "album", 8, 0.5, 0)))
    if sizes:
        [(splits, _)] = results
        assert (len(splits["train"].labels), len(splits["test"].labels)) == sizes
        assert words in capsys.readouterr().out
    else:
        assert words in message


@linux
@pytest.mark.parametrize("place", ["train/apple/more", "test/sky", "train", ".dvcignore"])
def test_what_dvc_does_not_hash_is_refused(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    album(Path("elsewhere"), "")
    album(Path("images"), "train", "test")
    if place == ".dvcignore":
        Path(place).write_text("3.png\n", encoding="utf-8")
    else:
        shutil.rmtree(Path("images", place), ignore_errors=True)
        Path("images", place).symlink_to(tmp_path / "elsewhere")
    assert "DVC would not notice a change of it" in refusal(
        lambda: read_folders(Path("images"), 8, 0.5, 0)
    )


@linux
def test_own_weights_that_dvc_does_not_hash_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    Path("elsewhere").mkdir()
    Path("weights/more").symlink_to(tmp_path / "elsewhere")
    Path(".dvcignore").write_text("old*\n", encoding="utf-8")
    for name in ("weights/more/a.pth", "weights/old.pth"):
        torch.save({}, name)
        message = refusal(lambda name=name: pretrained("resnet18", name))
        assert f"{name}: DVC would not notice" in message


@linux
def test_a_pipe_among_images_does_not_hang(tmp_path):
    album(tmp_path, "train", "test")
    os.mkfifo(tmp_path / "train/sky/pipe.png")
    assert "sky/pipe.png: " in refusal(lambda: read_folders(tmp_path, 8, 0.5, 0))
    assert "is not a regular file" in refusal(
        lambda: read_image(tmp_path / "train/sky/pipe.png", 8)
    )


@pytest.mark.parametrize(
    ("name", "variables", "words"),
    [
        ("download", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
         "the encoding of file names is ascii"),
        ("train frozen", {"OMP_DYNAMIC": "true", "TORCHELASTIC_RUN_ID": "x"}, None),
        ("train finetuned", {"OMP_THREAD_LIMIT": "1"}, None),
        ("evaluate", {"OMP_MAX_ACTIVE_LEVELS": "0"}, None),
        ("render", {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, None),
    ],
)  # fmt: skip
@linux
def test_what_the_environment_says_is_refused_or_got_over(project, name, variables, words):
    done = stage(project, name, **variables)
    assert (done.returncode == 0) == (words is None), done.stderr
    assert "Traceback" not in done.stderr
    if words:
        assert done.stderr.splitlines()[-1].startswith(f"error: {words}")


def test_an_error_is_said_under_the_environment_of_torchrun(project):
    around = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    variables = dict.fromkeys(around, "1") | {
        "MASTER_PORT": "29511", "TORCHELASTIC_ERROR_FILE": str(project / "error.json"),
    }  # fmt: skip
    done = python(project, "-m", "tools.predict", "no.png", **variables)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: no.png: No such file or directory"


HANGING = """
import torch
from transfer.common.run import run_stage

def wait_for_a_thread_that_never_comes():
    torch.set_num_threads(2)
    convolution = torch.nn.Conv2d(16, 64, 3).to(memory_format=torch.channels_last)
    print("starts", flush=True)
    convolution(torch.rand(64, 16, 64, 64)).sum().backward()

run_stage("hanging", wait_for_a_thread_that_never_comes)
"""


@linux
def test_what_ends_a_stage_ends_it_also_inside_c_code(project):
    limit = {"OMP_THREAD_LIMIT": "1"}
    with start(project, "-c", HANGING, variables=limit) as child:
        assert child.stdout.readline() == "starts\n"
        while psutil.Process(child.pid).cpu_times().user < 1.5:  # importing takes about 1
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        assert child.wait() != 0


@linux
def test_a_stage_whose_dvc_is_gone_before_it_starts_ends(project):
    """A process stands for DVC: it starts the stage as DVC does, and is gone at once."""
    code = (
        "import os, pathlib, subprocess, sys; os.environ['DVC_STAGE'] = 'train@frozen'; "
        "lock = pathlib.Path('.dvc/tmp/rwlock'); lock.write_text('{\"pid\": %d}' % os.getpid()); "
        "print(subprocess.Popen([sys.executable, '-m', 'stages.train', 'frozen']).pid)"
    )
    (project / "models/frozen.safetensors").unlink()
    set_params(project, {"train": {"frozen": {"epochs": 300}}})  # takes much longer than to notice
    with start(project, "-c", code) as child:
        number = int(child.stdout.readline())
        child.stdout.read()  # until the stage has also ended
    while psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.1)
    assert not (project / "models/frozen.safetensors").exists()


def test_a_failed_stage_keeps_the_earlier_results(project):
    before = contents(project / "models") | contents(project / "metrics")
    set_params(project, {"train": {"shared": {"images": 9}}})
    output = dvc(project, "repro", "train@frozen", fails=True)
    assert "\nerror: train.shared.images = 9: must be at least 10, one of each class" in output
    gone = project / "metrics/training/frozen.json"  # by which DVC sees that training has run
    after = contents(project / "models") | contents(project / "metrics")
    assert after == {path: content for path, content in before.items() if path != gone}
    git(project, "restore", ".")
    assert "up to date" in dvc(project, "status")
    set_params(project, {"train": {"launcher": "true", "frozen": {"epochs": 1}}})
    assert "does not exist" in dvc(project, "repro", "train@frozen", fails=True)


@pytest.mark.parametrize("name", ["100%25", "sp\u00e4t"])
def test_an_experiment_that_dvc_would_lose_is_refused(tmp_path, monkeypatch, name):
    copy = tmp_path / name / ".dvc/tmp/exps/tmpabc"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert f"{tmp_path / name}: has % or letters" in refusal(check_surroundings)
    monkeypatch.chdir(tmp_path / name)
    assert refusal(check_surroundings) is None  # as dvc repro works there


def test_each_stage_records_its_machine_and_its_images(reproduced):
    costs = json.loads((reproduced / "metrics/cost.json").read_text())
    assert all({"cpu", "torch"} < set(cost["machine"]) for cost in costs.values())
    for mode in MODES:
        record = json.loads((reproduced / f"metrics/training/{mode}.json").read_text())
        assert record | {"training_images": 350, "validation_images": 50} == record


def test_a_temperature_that_the_images_do_not_determine_is_said(params, stripes, capsys):
    network = build(params.model, 10)
    five = stripes.take(torch.zeros(5, dtype=torch.long))
    for bias, below in ((3, 1), (-1e3, 20.1)):  # all are right; all are far from it
        with torch.no_grad():
            network.head[-1].bias[stripes.labels[0]] = bias
        assert 0.049 < calibrate(network, five, 32) < below
        assert "5 validation images do not determine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("epochs", "words"), [(1, "frozen epoch 1/1: a logit is the same"), (3, "$")]
)
def test_logits_that_are_the_same_at_first_may_recover(params, stripes, epochs, words):
    """A far too high running variance of BatchNorm, which halves in each step."""
    changes = {"shared": {"min_steps": 34}, "frozen": {"epochs": epochs}}
    params = params.changed({"model": {"batch_norm_momentum": 0.5}, "train": changes})
    network = build(params.model, 10)
    network.head[0][1].running_var.fill_(1e36)
    mode = make_mode("frozen", network, stripes, params, torch.device("cpu"))
    assert re.match(words, refusal(lambda: train(mode, stripes)) or "")


def test_names_are_measured_and_half_a_percent_is_not_nothing():
    wide, narrow = (figures.fitting(letter * 60, 1.5, 10) for letter in "Wl")
    assert len(wide) < len(narrow) < 60
    counts = torch.tensor([[995, 5], [4, 996]]).numpy()
    figure = figures.confusion(dict.fromkeys(MODES, counts), ["a", "b"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["100", "1", "\u00b7", "100"]
    figures.plt.close(figure)


def test_assets_that_are_missing_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSETS_DIR", str(tmp_path))
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py/batches.meta").unlink()
    for action, words in (
        (lambda: read_cifar10(ROOT / "cifar10.md5"), "batches.meta: is missing: .*CIFAR-10"),
        (lambda: pretrained("resnet18", "IMAGENET1K_V1"), "resnet18-.*IMAGENET1K_V1 of resnet18"),
    ):
        assert re.search(f"{words}.* unset ASSETS_DIR to download it", refusal(action))
