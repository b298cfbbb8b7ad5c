"""What cannot be run here: other systems and accelerators, as far as it can be checked without."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from tools.isolated import environment
from transfer import inference
from transfer.common.dataset import Split
from transfer.common.settings import MODES
from transfer.inference import predict, to_input
from transfer.model import build
from transfer.training import batches, loop
from transfer.training.optimizer import make_optimizers, make_schedules

CODE = [p for d in ("stages", "transfer", "tools", "benchmarks") for p in (ROOT / d).rglob("*.py")]
# What is missing on Windows (and partly on macOS), hidden from the project's own modules.
BLOCKED = """
import builtins, os

ours, original = ("stages", "transfer", "tools", "benchmarks"), builtins.__import__

def guarded(name, globals=None, *rest, **more):
    missing = name in ("fcntl", "resource", "pwd", "grp", "termios")
    if missing and str((globals or {}).get("__name__")).startswith(ours):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return original(name, globals, *rest, **more)

builtins.__import__ = guarded
import torch, dvclive, psutil  # they may use what they like
for name in ("killpg", "fork", "sched_setaffinity", "sched_getaffinity", "mkfifo"):
    delattr(os, name)
"""


def blocked(folder: Path, code: str) -> None:
    """Run `code` in `folder`, in a Python that has only what all systems have."""
    command = [sys.executable, "-c", BLOCKED + code]
    done = subprocess.run(command, cwd=folder, env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_every_module_imports_with_what_all_systems_have():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in CODE]
    assert len(names) > 30
    blocked(ROOT, f"import importlib\nfor name in {names}: importlib.import_module(name)")


def test_the_stages_run_with_what_all_systems_have(project):
    before = (project / "metrics/evaluation.json").read_bytes()
    (project / "metrics/evaluation.json").unlink()
    runs = [("download",), ("backbone",), *(("train", mode) for mode in MODES), ("evaluate",),
            ("render",)]  # fmt: skip
    code = (
        "from transfer.common.run import run_stage\nimport importlib\n"
        f"for name, *mode in {runs}:\n"
        "    module = importlib.import_module(f'stages.{name}')\n"
        "    run_stage(name, lambda: module.main(*mode))\n"
    )
    blocked(project, code)
    assert (project / "metrics/evaluation.json").read_bytes() == before


def calls(path: Path):
    """Each call in the module at `path`: the name of what is called, and the call."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = node.func
            yield getattr(called, "attr", getattr(called, "id", "")), node


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_has_an_encoding_and_paths_are_joined_by_the_library(path):
    for name, call in calls(path):
        arguments = {keyword.arg for keyword in call.keywords}
        constants = [a.value for a in call.args if isinstance(a, ast.Constant)]
        binary = any(isinstance(c, str) and "b" in c and len(c) <= 3 for c in constants)
        archive = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in (
            "tarfile", "Image", "webbrowser"
        )  # fmt: skip
        if name in ("read_text", "write_text") and path.name != "files.py":
            own = ast.unparse(call.func) == "write_text"  # transfer.common.files', which is UTF-8
            assert own or "encoding" in arguments, ast.unparse(call)
        elif name == "open" and not binary and not archive:
            assert "encoding" in arguments, ast.unparse(call)
        assert "text" not in arguments or "encoding" in arguments, ast.unparse(call)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            for side in (node.left, node.right):
                value = getattr(side, "value", None)
                joined = isinstance(value, str) and value.strip() in ("/", "\\")
                assert not joined, ast.unparse(node)


def to_fake(network: torch.nn.Module, device: str) -> None:
    """What `network.to(device)` does, which torch cannot do with fake tensors."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().to(device))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def data_on(device: str) -> Split:
    images = torch.zeros(64, 32, 32, 3, dtype=torch.uint8, device=device)
    return Split(images, torch.zeros(64, dtype=torch.long, device=device))


class TestFakeCuda:
    """Fake CUDA tensors have devices and types that must agree, but need no GPU.

    The backward pass cannot run on them where there is no GPU (torch 2.15 asks the driver for the
    device), so gradients are filled in, and the backward pass runs on torch's device "meta".
    """

    @pytest.fixture
    def fill_in_gradients(self, monkeypatch):
        def fill(learner: torch.nn.Module) -> None:
            def backward(_loss):
                for parameter in learner.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)

            monkeypatch.setattr(torch.Tensor, "backward", backward)

        return fill

    @pytest.fixture(autouse=True)
    def no_fake_tensor_is_kept(self):
        inference._normalisation.cache_clear()
        yield
        inference._normalisation.cache_clear()

    @pytest.fixture(autouse=True)
    def no_driver(self, monkeypatch):
        """Nothing may ask the driver how much memory is free and what the GPU can do."""
        monkeypatch.setattr(loop, "check_memory", lambda *_: None)
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)

    @pytest.mark.parametrize("cached", [True, False])
    @pytest.mark.parametrize("bf16", [True, False])
    @pytest.mark.parametrize("mode", MODES)
    def test_a_step_resumed_from_the_cpu_and_a_prediction(
        self, params, monkeypatch, fill_in_gradients, mode, bf16, cached
    ):
        if not cached:
            monkeypatch.setattr(batches, "CACHE_BYTES", 0)
        params = params.changed({"train": {"bf16": bf16}})
        with FakeTensorMode(allow_non_fake_inputs=True):
            kept = self.state_of_the_cpu(params, mode, fill_in_gradients)
            network = build(params.model, 10)
            to_fake(network, "cuda")
            data = data_on("cuda")
            learner_in, batches_of = loop.prepare(network, mode, data, params)
            learner = learner_in(0)
            optimizers = make_optimizers(network, mode, params)
            for optimizer, state in zip(optimizers, kept, strict=True):
                optimizer.load_state_dict(state)
            schedules = make_schedules(optimizers, 10, 0, params)
            fill_in_gradients(learner)
            for epoch in range(2):
                x, labels = next(batches_of(epoch))
                loss, correct = loop.take_step(learner, x, labels, optimizers, schedules, params)
                on = {t.device.type for t in (x, labels, loss, correct, *learner.parameters())}
                assert on == {"cuda"}
            wanted = torch.bfloat16 if bf16 else torch.float32
            with batches.autocast(x.device, params):
                assert learner(x).dtype == wanted
            states = [s for optimizer in optimizers for s in optimizer.state.values()]
            assert {t.device.type for s in states for k, t in s.items() if k != "step"} == {"cuda"}
            logits = predict(network, torch.zeros(8, 32, 32, 3, dtype=torch.uint8), 32)
            assert (logits.device.type, logits.dtype) == ("cpu", torch.float32)

    def state_of_the_cpu(self, params, mode, fill_in_gradients) -> list[dict]:
        """The optimizers' states after a step on the CPU."""
        network = build(params.model, 10)
        learner_in, batches_of = loop.prepare(network, mode, data_on("cpu"), params)
        learner = learner_in(0)
        optimizers = make_optimizers(network, mode, params)
        fill_in_gradients(learner)
        schedules = make_schedules(optimizers, 10, 0, params)
        loop.take_step(learner, *next(batches_of(0)), optimizers, schedules, params)
        return [optimizer.state_dict() for optimizer in optimizers]

    @pytest.mark.parametrize("left", ["labels", "input", "parameter"])
    def test_a_tensor_left_on_the_cpu_is_noticed(self, params, fill_in_gradients, left):
        with FakeTensorMode(allow_non_fake_inputs=True):
            network = build(params.model, 10)
            to_fake(network, "cuda")
            learner_in, batches_of = loop.prepare(network, "finetuned", data_on("cuda"), params)
            learner = learner_in(0)
            optimizers = make_optimizers(network, "finetuned", params)
            schedules = make_schedules(optimizers, 10, 0, params)
            fill_in_gradients(learner)
            x, labels = next(batches_of(0))
            if left == "parameter":
                bias = network.head[-1].bias
                network.head[-1].bias = torch.nn.Parameter(torch.zeros(bias.shape))
            x = x.cpu() if left == "input" else x
            labels = labels.cpu() if left == "labels" else labels
            with pytest.raises(Exception, match="device"):
                loop.take_step(learner, x, labels, optimizers, schedules, params)

    @pytest.mark.parametrize("mode", MODES)
    def test_the_backward_pass_stays_on_its_device(self, params, mode):
        """On torch's device without storage, where a tensor of another device is refused, too."""
        network = build(params.model, 10).to("meta")
        trained = network if mode == "finetuned" else network.head
        images = torch.zeros(4, 32, 32, 3, dtype=torch.uint8, device="meta")
        x = to_input(images, 32) if mode == "finetuned" else network.backbone(to_input(images, 32))
        loss = torch.nn.functional.cross_entropy(
            trained(x), torch.zeros(4, dtype=torch.long, device="meta")
        )
        loss.backward()
        assert {p.grad.device.type for p in trained.parameters()} == {"meta"}
