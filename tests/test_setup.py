"""tools.setup, without what needs a package index."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tools import setup


def names(text: str) -> set[str]:
    return set(re.findall(r"^([\w.-]+)==", text, re.M))


def test_cpu_leaves_out_cuda_and_no_more(monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    [(*_, torch, torchvision), (*_, rest)] = setup.installs(cpu=True)
    lock = setup.LOCK.read_text(encoding="utf-8")
    assert f"\n{torch} " in lock
    assert f"\n{torchvision} " in lock
    left = names(lock) - names(Path(rest).read_text(encoding="utf-8"))
    assert {"torch", "torchvision", "triton"} < left
    assert all(re.match("torch|triton|nvidia-c|nvidia-n|cuda-", name) for name in left)
    [(*_, whole)] = setup.installs(cpu=False)
    assert whole == str(setup.LOCK)


def test_a_command_runs_in_the_environment_and_its_status_is_kept(monkeypatch):
    monkeypatch.setattr(setup, "SCRIPTS", Path(sys.executable).parent)
    assert setup.run(["python", "-c", "import os, sys; sys.exit('VIRTUAL_ENV' in os.environ)"]) == 1
    with pytest.raises(SystemExit, match="error: nowhere: there is no such program"):
        setup.run(["nowhere"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_what_is_terminated_ends_its_command():
    command = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = f"""import sys
from tools import setup
setup.set_up = lambda cpu: None  # this environment
sys.argv[1:] = [sys.executable, "-c", {command!r}]
setup.exit_cleanly(setup.main)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=setup.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    ) as child:  # fmt: skip
        number = int(child.stdout.readline())
        child.terminate()
        assert child.communicate() == ("", "error: terminated\n")
    assert not psutil.pid_exists(number)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
def test_a_command_has_time_to_clean_up_after_ctrl_c():
    command = """import time
try:
    time.sleep(1)
    print(flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    print("clean", flush=True)
"""
    call = f"lambda: setup.wait_for([sys.executable, '-c', {command!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; from tools import setup; setup.exit_cleanly({call})"],
        cwd=setup.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
        start_new_session=True,
    ) as child:  # fmt: skip
        child.stdout.readline()
        os.killpg(child.pid, signal.SIGINT)
        assert child.stdout.read() == "clean\n"
    assert child.returncode == 1


def test_an_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    with pytest.raises(SystemExit, match=r"Python 3\.11\.4 or newer is needed"):
        setup.set_up(cpu=False)
