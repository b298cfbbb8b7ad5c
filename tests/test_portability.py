"""What cannot be run here: other systems and accelerators, as far as it can be checked without."""

import pytest
import torch
from helpers import python, set_params
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from transfer import model
from transfer.common.dataset import Split
from transfer.inference import predict
from transfer.model import build
from transfer.training.loop import check_settings
from transfer.training.modes import Finetuned, Frozen, Mode
from transfer.training.optimizer import ScheduledOptimizers

# Other libraries may use what they like; what Windows lacks (and partly macOS) is then hidden.
CODE = """
import dvc.repo, importlib, matplotlib.pyplot, os, pathlib, psutil, sys, torchvision
for name in ("fcntl", "resource", "termios", "grp"):
    sys.modules[name] = None
for name in ("killpg", "fork", "sched_setaffinity", "sched_getaffinity", "mkfifo"):
    delattr(os, name)
for folder in ("stages", "transfer", "tools", "benchmarks"):
    for path in pathlib.Path(folder).rglob("*.py"):
        importlib.import_module(".".join(path.with_suffix("").parts))
train = sys.modules["stages.train"]
train.run_stage("train@frozen", lambda: train.main("frozen"))
"""


def test_all_modules_load_and_training_runs_with_what_all_systems_have(project):
    set_params(project, {"train": {"frozen": {"epochs": 1}}})
    done = python(project, "-c", CODE)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def without_values(monkeypatch):
    """That a folded backbone computes the same cannot be checked where tensors have no values."""
    monkeypatch.setattr(model, "nearly_equal", lambda *_: True)


def mode_on(device: str, mode: type[Mode], params) -> Mode:
    with torch.device(device):
        images = torch.zeros(64, 32, 32, 3, dtype=torch.uint8)
        data = Split(images, torch.zeros(64, dtype=torch.long))
        return mode(build(params.model, 10), data, params)


@pytest.mark.usefixtures("without_values")
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch knows no CUDA")
@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("mode", [Frozen, Finetuned])
def test_all_is_on_the_gpu_and_what_is_left_on_the_cpu_is_noticed(params, mode):
    """With torch's fake tensors, which have devices but no values, and no backward pass."""
    with FakeTensorMode():
        learning = mode_on("cuda", mode, params)
        check_settings(learning)
        learner, images = learning.learner(0), learning.data.images.cpu()
        x, labels = next(iter(learning.batches(0)))
        loss = F.cross_entropy(learner(x), labels)
        assert {tensor.device.type for tensor in (x, labels, loss)} == {"cuda"}
        assert predict(learning.network, images, 32).device.type == "cpu"
        with pytest.raises(Exception, match="device"):
            F.cross_entropy(learner(x), labels.cpu())
        learning.network.head[-1].bias = torch.nn.Parameter(torch.zeros(10))
        with pytest.raises(Exception, match="device"):
            F.cross_entropy(learner(x), labels)


@pytest.mark.usefixtures("without_values")
def test_a_step_resumed_from_the_cpu_stays_on_its_device(params):
    kept = None
    for device in ("cpu", "meta"):  # torch's device without values has a backward pass
        learning = mode_on(device, Finetuned, params)
        both = ScheduledOptimizers(learning.network, learning.peak_rates, params.train, 10)
        x, labels = next(iter(learning.batches(0)))
        F.cross_entropy(learning.learner(0)(x), labels).backward()
        both.optimizers[0].step()  # Muon; fused AdamW cannot start there
        both.load_state(kept or both.state())
        both.step()
        kept = both.state()
    states = [state for part in both.optimizers for state in part.state.values()]
    on = {t.device.type for state in states for key, t in state.items() if key != "step"}
    assert on == {p.grad.device.type for p in learning.network.parameters()} == {"meta"}
