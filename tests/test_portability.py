"""What cannot be run here: other systems and accelerators, as far as it can be checked without."""

import pytest
import torch
from helpers import python, set_params
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from stages import train as training
from transfer.data import Split
from transfer.model import Network, predict
from transfer.settings import MODES

# Other libraries may use what they like; what Windows lacks (and partly macOS) is then hidden.
CODE = """
import dvc.repo, importlib, matplotlib.pyplot, os, pathlib, psutil, sys, torchvision
for name in ("fcntl", "resource", "termios", "grp"):
    sys.modules[name] = None
for name in ("killpg", "fork", "sched_setaffinity", "sched_getaffinity", "mkfifo"):
    delattr(os, name)
for folder in ("stages", "transfer", "tools"):
    for path in pathlib.Path(folder).rglob("*.py"):
        importlib.import_module(".".join(path.with_suffix("").parts))
sys.modules["stages.train"].main("frozen")
"""


def test_all_modules_load_and_training_runs_with_what_all_systems_have(project):
    set_params(project, {"train.frozen.epochs": 1})
    done = python(project, "-c", CODE)
    assert done.returncode == 0, done.stderr
    assert "frozen epoch 1:" in done.stdout


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch knows no CUDA")
@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu_nothing_is_left_on_the_cpu(params, mode, monkeypatch):
    """With torch's fake tensors, which have devices, but neither values nor gradients."""
    losses = []

    def backward(loss):
        losses.append(loss.device.type)
        raise InterruptedError

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(training, "CACHE_BYTES", 0)
    monkeypatch.setattr(training, "folded", lambda backbone, x: backbone)
    with FakeTensorMode(shape_env=ShapeEnv()):
        with torch.device("cuda"):
            network = Network(params.model, list("abcdefghij"))
        images, index = torch.zeros(64, 32, 32, 3, dtype=torch.uint8), torch.arange(64)
        with pytest.raises(InterruptedError):
            training.train(mode, network, Split(images, index % 10), index, index, params)
        assert losses == ["cuda"]
        assert predict(network, images).device.type == "cpu"
