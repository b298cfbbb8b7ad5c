"""Downloads from a real server on this machine that misbehaves as each case tells it to."""

import hashlib
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import contents, refusal
from test_sources import make_official
from torchvision.datasets import CIFAR10
from torchvision.models import SqueezeNet1_1_Weights

from transfer import fetch
from transfer.pretrained import pretrained
from transfer.sources.cifar10 import read_cifar10

pytestmark = pytest.mark.faults
FAULTS = {  # answers: status, what becomes of the content, how many bytes of it are sent
    "cut off": (200, bytes, 500),
    "hangs": (200, bytes, 400),
    "404": (404, bytes, None),
    "503": (503, bytes, None),
    "altered": (200, bytes.swapcase, None),
    "another page": (200, lambda _: b"<p>Log in", None),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        status, change, sent = (self.server.faults or [(200, bytes, None)]).pop(0)
        content = change(self.server.content)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent])
        if sent == 400:
            self.server.release.wait(100)
            self.wfile.write(content[sent:])


def weights(server, folder, monkeypatch):
    torch.save({"weight": torch.arange(99.0)}, folder / "weights")
    server.content = (folder / "weights").read_bytes()
    name = f"squeezenet1_1-{hashlib.sha256(server.content).hexdigest()[:8]}.pth"
    monkeypatch.setattr(SqueezeNet1_1_Weights.IMAGENET1K_V1.value, "url", f"{server.url}/{name}")
    kept = folder / "torch/hub/checkpoints" / name
    return kept, lambda: pretrained("squeezenet1_1", "IMAGENET1K_V1")["weight"]


def cifar10(server, folder, monkeypatch):
    listing = make_official(folder, monkeypatch)
    shutil.make_archive(str(folder / "archive"), "gztar", folder, CIFAR10.base_folder)
    server.content = (folder / "archive.tar.gz").read_bytes()
    monkeypatch.setattr(CIFAR10, "url", server.url)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(server.content).hexdigest())
    kept = folder / "torch/hub/datasets" / CIFAR10.base_folder / "test_batch"
    return kept, lambda: read_cifar10(listing)[0]["test"].images


@pytest.fixture(params=[weights, cifar10])
def server(request, tmp_path, monkeypatch):
    """A server of what `read` needs; a bad version of it is `kept` in torch's cache."""
    monkeypatch.setattr(fetch, "TIMEOUT", 3)
    monkeypatch.setattr(fetch, "TRIES", 2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.faults, server.asked, server.release = [], 0, threading.Event()
        server.kept, server.read = request.param(server, tmp_path, monkeypatch)
        server.kept.parent.mkdir(parents=True)
        server.kept.write_bytes(b"bad")
        monkeypatch.setenv("ASSETS_DIR", "")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        monkeypatch.setenv("no_proxy", "*")
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.release.set()
        server.shutdown()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_harms_nothing_and_a_passing_one_is_got_over(server, fault):
    server.faults = [FAULTS[fault]] * 3
    assert re.match(
        f"{server.url}.*: cannot be downloaded: .+; without internet, set ASSETS_DIR",
        refusal(server.read),
    )
    assert contents(server.kept.parents[1]) == {server.kept: b"bad"}
    assert torch.equal(server.read(), server.read())  # downloaded once
    assert server.asked == 4


def test_without_a_server_or_a_place_one_line_says_so(server, tmp_path, monkeypatch):
    server.shutdown()
    server.server_close()
    assert "refused>; without internet, set ASSETS_DIR" in refusal(server.read)
    for place in (server.kept, "/proc/no/folder/of/mine"):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / place))
        assert re.match(f".*{place}/.*: cannot be written: ", refusal(server.read))


def test_two_at_once_do_no_harm(server):
    server.faults = [FAULTS["hangs"]]
    with ThreadPoolExecutor() as pool:
        reads = [pool.submit(server.read) for _ in range(2)]
        next(as_completed(reads)).result()
        server.release.set()
    assert torch.equal(*(read.result() for read in reads))
    assert not list(server.kept.parents[1].rglob(".partial*"))
