"""Downloads from a real server on this machine that misbehaves as each case tells it to."""

import contextlib
import functools
import hashlib
import io
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import ROOT, refusal, stage
from torchvision.datasets import CIFAR10
from torchvision.models import SqueezeNet1_1_Weights

from transfer import fetch
from transfer.pretrained import pretrained
from transfer.sources.cifar10 import read_batches, read_official

pytestmark = pytest.mark.faults
CONTENT = random.Random(0).randbytes(1_000_000)
EARLIER = b"an earlier version of the file, good in its time"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers with `server.content`, but for what the next entry of `server.script` says.

    Its keys: `status`; `content` in place of the true one; `cut` after so many bytes; `silent`, no
    answer, and `pause` after so many bytes, both until `server.release` is set; `closed`, no answer
    at all; `length` in place of the true one (None: leave out).
    """

    def do_GET(self):
        server = self.server
        how = server.script.pop(0) if server.script else server.then
        server.asked += 1
        if how.get("silent"):
            server.release.wait(60)
        if how.get("silent") or how.get("closed"):
            return
        content = how.get("content", server.content)
        self.send_response(how.get("status", 200))
        if (length := how.get("length", str(len(content)))) is not None:
            self.send_header("Content-Length", length)
        self.end_headers()
        if "pause" in how:
            self.send(content[: how["pause"]])
            server.release.wait(60)
            content = content[how["pause"] :]
        self.send(content[: how.get("cut")])

    def send(self, body):
        with contextlib.suppress(OSError):  # the client is gone
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of CONTENT at `url`; once its `script` is at its end, it does as `then` says."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "RETRIES", 2)
    monkeypatch.setattr(fetch, "TIMEOUT", 1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_address[1]}/file"
        server.content, server.script, server.then, server.asked = CONTENT, [], {}, 0
        server.release = threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def path(tmp_path) -> Path:
    """Where the file goes; an earlier version of it is there."""
    (tmp_path / "file").write_bytes(EARLIER)
    return tmp_path / "file"


def get(server, path):
    fetch.fetch(server.url, path, "sha256", sha256(CONTENT))


FAULTS = {
    "cut": {"cut": 300_000},
    "cut, no length": {"cut": 300_000, "length": None},
    "no answer": {"closed": True},
    "hangs": {"silent": True},
    "hangs in the middle": {"pause": 300_000},
    "404": {"status": 404},
    "429": {"status": 429},
    "503": {"status": 503},
    "byte altered": {"content": CONTENT[:200] + b"\0\1\2" + CONTENT[203:]},
    "truncated": {"content": CONTENT[:-9]},
    "empty": {"content": b""},
    "another page": {"content": b"<p>Log in"},
    "told to be longer": {"length": "1000009"},
    "told to be shorter": {"length": "999991"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_got_over(server, path, fault):
    server.script = [FAULTS[fault]]
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["file"]
    assert server.asked == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_ends_in_one_line_and_harms_nothing(server, path, monkeypatch, fault):
    monkeypatch.setattr(fetch, "RETRIES", 1)
    server.then = FAULTS[fault]
    message = refusal(lambda: get(server, path))
    assert message.startswith(f"{server.url}: cannot be downloaded: ")
    assert message.endswith("docs/troubleshooting.md says how to work without internet")
    assert server.asked == 2
    assert path.read_bytes() == EARLIER
    assert os.listdir(path.parent) == ["file"]


def test_nobody_listens(server, path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server.url = f"http://127.0.0.1:{taken.getsockname()[1]}/file"
    assert "Connection refused" in refusal(lambda: get(server, path))


@pytest.mark.parametrize("name", ["file/in/a/file", "/proc/no/folder/of/mine"])
def test_a_folder_that_cannot_be_written_is_named(server, tmp_path, path, name):
    message = refusal(lambda: get(server, tmp_path / name))
    assert re.match(r"/.*: cannot be written: .*", message)
    assert server.asked == 0
    assert path.read_bytes() == EARLIER


@pytest.mark.parametrize("digits", [8, 64])
def test_what_is_there_and_correct_is_not_downloaded(server, path, digits):
    path.write_bytes(CONTENT)
    fetch.fetch(server.url, path, "sha256", sha256(CONTENT)[:digits])
    assert server.asked == 0


@pytest.mark.parametrize("killed", [False, True], ids=["both live", "the first is killed"])
def test_two_at_once_do_no_harm(server, path, killed):
    server.script = [{"pause": 500_000}]
    script = (
        "import sys; from pathlib import Path; from transfer.fetch import fetch; "
        "fetch(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])"
    )
    arguments = [server.url, str(path), "sha256", sha256(CONTENT)]
    with subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT) as first:
        while not server.asked:
            assert first.poll() is None
        get(server, path)
        assert path.read_bytes() == CONTENT
        first.kill() if killed else server.release.set()
    assert path.read_bytes() == CONTENT


def test_the_stage_ends_in_one_line_without_a_network(tmp_path):
    for name in ("params.yaml", "cifar10.md5"):
        shutil.copy(ROOT / name, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
    done = stage(
        tmp_path, "download", PYTHONPATH=str(ROOT), TORCH_HOME=str(tmp_path / "torch"),
        https_proxy=nowhere, no_proxy="",
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {CIFAR10.url}: cannot be downloaded: ")


@pytest.fixture
def archive(server, batches, tmp_path, monkeypatch):
    """A function that serves an archive as CIFAR-10, with more members added or altered."""
    monkeypatch.delenv("ASSETS_DIR", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(CIFAR10, "url", server.url)

    def serve(members=(), alter=lambda content: content) -> Path:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            tar.add(batches, CIFAR10.base_folder)
            for member in members:
                content = b"evil" if member.isreg() else b""
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        server.content = alter(file.getvalue())
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(server.content).hexdigest())
        return tmp_path / "torch/hub/datasets" / CIFAR10.filename

    return serve


def test_cifar10_is_downloaded_once_and_unpacked(server, archive, batches, tmp_path):
    kept = archive()
    server.script = [{"cut": 1000}]
    read = functools.partial(read_official, batches / "MD5SUMS")
    splits, classes = read()
    expected, names = read_batches(batches, batches / "MD5SUMS")
    assert classes == names
    for name, split in expected.items():
        assert torch.equal(splits[name].images, split.images)
        assert torch.equal(splits[name].labels, split.labels)
    assert os.listdir(tmp_path / "temporary") == []
    read()
    assert server.asked == 2
    kept.write_bytes(b"damaged")
    read()
    assert server.asked == 3


def member(name, kind=tarfile.REGTYPE, target="") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.mark.parametrize(
    "members",
    [
        [member("../evil")],
        [member("cifar-10-batches-py/../../evil")],
        [member("{tmp}/evil")],
        [member("link", tarfile.SYMTYPE, ".."), member("link/evil")],
        [member("link", tarfile.SYMTYPE, "{tmp}"), member("link/evil")],
        [member("link", tarfile.LNKTYPE, "../../file"), member("link")],
        [member("evil", tarfile.FIFOTYPE)],
    ],
    ids=["above", "above, later", "absolute", "link", "absolute link", "hard link", "pipe"],
)
def test_an_archive_that_leaves_its_folder_is_refused(archive, batches, path, tmp_path, members):
    for info in members:
        info.name = info.name.replace("{tmp}", str(tmp_path))
        info.linkname = info.linkname.replace("{tmp}", str(tmp_path))
    kept = archive(members)
    message = refusal(lambda: read_official(batches / "MD5SUMS"))
    assert message.startswith(f"{kept}: cannot be unpacked")
    assert list(tmp_path.rglob("*evil*")) == []
    assert os.listdir(tmp_path / "temporary") == []
    assert path.read_bytes() == EARLIER


@pytest.mark.parametrize(
    "alter",
    [
        lambda content: content[:-50_000],
        lambda content: content[:9] + bytes(9) + content[18:],
        lambda content: content[:50_000] + b"\xff" * 999 + content[50_999:],
        lambda content: b"no archive",
        lambda content: b"",
    ],
    ids=["truncated", "altered", "altered inside", "no archive", "empty"],
)
def test_a_damaged_archive_is_named(archive, batches, tmp_path, alter):
    kept = archive(alter=alter)
    message = refusal(lambda: read_official(batches / "MD5SUMS"))
    assert message.startswith(f"{kept}: cannot be unpacked")
    assert os.listdir(tmp_path / "temporary") == []


def test_weights_are_downloaded_once_and_a_bad_copy_replaced(server, tmp_path, monkeypatch):
    monkeypatch.delenv("ASSETS_DIR", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = io.BytesIO()
    torch.save({"weight": torch.arange(5.0)}, file)
    server.content = file.getvalue()
    name = f"squeezenet1_1-{sha256(server.content)[:8]}.pth"
    url = server.url.replace("file", name)
    monkeypatch.setattr(SqueezeNet1_1_Weights.IMAGENET1K_V1.value, "url", url)
    path = tmp_path / "hub/checkpoints" / name

    def weights():
        return pretrained("squeezenet1_1", "IMAGENET1K_V1")["weight"].tolist()

    server.script = [{"cut": 500}]
    assert weights() == weights() == [0, 1, 2, 3, 4]
    assert server.asked == 2
    path.write_bytes(b"damaged")
    server.script = [{"status": 404}] * 3
    assert refusal(weights).startswith(f"{url}: cannot be downloaded: 404")
    assert path.read_bytes() == b"damaged"
    assert weights() == [0, 1, 2, 3, 4]
    assert path.read_bytes() == server.content
