"""Downloads from a real server on this machine that misbehaves as each case tells it to."""

import hashlib
import io
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, stage
from torchvision.datasets import CIFAR10
from torchvision.models import SqueezeNet1_1_Weights

from transfer import data, download, model
from transfer.errors import InputError

WAITS = download.WAITS
CONTENT = random.Random(0).randbytes(1_000_000)
ALTERED = CONTENT[:200_000] + bytes([CONTENT[200_000] ^ 1]) + CONTENT[200_001:]
EARLIER = b"an earlier version of the file, good in its time"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers with `server.content`, but for what the next entry of `server.script` says.

    Its keys: `status`; `content` in place of the true one; `cut` after so many bytes, `reset` so;
    `pause` after so many bytes until `server.go_on` is set; `silent`, no answer until then;
    `closed`, no answer at all; `ranges` False, to ignore Range; `most` bytes in a range;
    `content_range` and `length` (None: leave out) in place of the true headers; `chunked`;
    more `headers`.
    """

    def do_GET(self):
        server = self.server
        how = server.script.pop(0) if server.script else server.then
        asked = self.headers["Range"]
        server.asked.append(asked)
        server.times.append(time.monotonic())
        if how.get("silent"):
            server.go_on.wait(60)
        if how.get("silent") or how.get("closed"):
            return
        content = how.get("content", server.content)
        start = int(asked[len("bytes=") : -1]) if asked and how.get("ranges", True) else 0
        end = min(len(content), start + how.get("most", len(content)))
        status = how.get("status", 200 if not start else 206 if start < len(content) else 416)
        body = content[start:end] if status in (200, 206) else b""
        headers = {
            "Content-Length": how.get("length", str(len(body))),
            "Content-Range": f"bytes {start}-{end - 1}/{len(content)}" if status == 206 else None,
        }
        if "content_range" in how:
            headers["Content-Range"] = how["content_range"]
        if how.get("chunked"):
            headers |= {"Transfer-Encoding": "chunked", "Content-Length": None}
        self.send_response(status)
        for name, value in (headers | how.get("headers", {})).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if how.get("chunked"):
            self.wfile.write(f"{len(body):x}\r\n".encode())
        if "pause" in how:
            self.send(body[: how["pause"]])
            server.go_on.wait(60)
            body = body[how["pause"] :]
        self.send(body[: how.get("cut")])
        if how.get("chunked") and "cut" not in how:
            self.wfile.write(b"\r\n0\r\n\r\n")
        if how.get("reset"):
            time.sleep(0.2)  # or what was sent may never be read
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def send(self, body):
        try:
            self.wfile.write(body)
            self.server.sent += len(body)
        except OSError:  # the client is gone
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of CONTENT at `url`; once its `script` is at its end, it does as `then` says."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "WAITS", (0.01, 0.02, 0.03, 0.04))
    monkeypatch.setattr(download, "TIMEOUT", 2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_address[1]}/file"
        server.content, server.script, server.then = CONTENT, [], {}
        server.asked, server.times, server.sent = [], [], 0
        server.go_on = threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


def fetch(server, path, content=CONTENT):
    download.fetch(server.url, path, "sha256", sha256(content))


def refused(server, path) -> str:
    """The error of a fetch that must fail; the file that was there before must be as it was."""
    with pytest.raises(InputError) as caught:
        fetch(server, path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.read_bytes() == EARLIER
    before = len(server.asked)
    fetch(server, path, EARLIER)
    assert len(server.asked) == before
    return message


@pytest.fixture
def path(tmp_path) -> Path:
    """Where the file goes; an earlier version of it is there."""
    (tmp_path / "file").write_bytes(EARLIER)
    return tmp_path / "file"


CUT = {"cut": 300_000}
ON = "bytes=300000-"
AFTER = "connection cut after 0.3 of 1.0 MB"
WRONG = f"its sha256 is not {sha256(CONTENT)}"


@pytest.mark.parametrize(
    ("script", "asked", "told"),
    [
        pytest.param([], [None], [], id="nothing"),
        pytest.param([CUT], [None, ON], [AFTER], id="cut"),
        pytest.param(
            [CUT, CUT],
            [None, ON, "bytes=600000-"],
            [AFTER, "cut after 0.6 of 1.0 MB"],
            id="cut twice",
        ),
        pytest.param([CUT | {"reset": True}], [None, ON], [AFTER + ": Connection"], id="reset"),
        pytest.param([CUT | {"chunked": True}], [None, ON], ["after 0.3 MB"], id="cut, chunked"),
        pytest.param([CUT | {"length": None}], [None, None], [WRONG], id="cut, no length told"),
        pytest.param([{"closed": True}], [None, None], ["no answer: Remote end"], id="no answer"),
        pytest.param([{"silent": True}], [None, None], ["no answer: timed out"], id="hangs"),
        pytest.param(
            [{"pause": 300_000}], [None, ON], [AFTER + ": timed out"], id="hangs in the middle"
        ),
        pytest.param([{"status": 503}], [None, None], ["503 Service Unavailable"], id="503"),
        pytest.param([{"status": 500}] * 4, [None] * 5, ["500 Internal"] * 4, id="500, 4 times"),
        pytest.param([{"status": 429}], [None, None], ["429 Too Many"], id="429"),
        pytest.param([{"status": 408}], [None, None], ["408 Request Timeout"], id="408"),
        pytest.param(
            [CUT, {"status": 503}], [None, ON, ON], [AFTER, "503"], id="cut, 503 keeps the part"
        ),
        pytest.param([{"content": ALTERED}], [None, None], [WRONG], id="byte altered"),
        pytest.param(
            [CUT | {"content": ALTERED}],
            [None, ON, None],
            [AFTER, WRONG],
            id="byte altered before the cut",
        ),
        pytest.param([{"content": CONTENT[:-9]}], [None, None], [WRONG], id="truncated"),
        pytest.param([{"length": "1000009"}], [None], [], id="whole, but told to be longer"),
        pytest.param([{"length": "999991"}], [None, None], [WRONG], id="told to be shorter"),
        pytest.param([{"length": "many"}], [None], [], id="length is no number"),
        pytest.param([{"chunked": True}], [None], [], id="chunked"),
        pytest.param(
            [{"headers": {"Content-Encoding": "gzip"}}], [None], [], id="archive told as encoding"
        ),
        pytest.param([CUT, {"ranges": False}], [None, ON], [AFTER], id="Range ignored"),
        pytest.param(
            [CUT, {"content_range": "bytes 299999-999999/1000000"}],
            [None, ON, None],
            [AFTER],
            id="another range",
        ),
        pytest.param(
            [CUT, {"content_range": None}], [None, ON, None], [AFTER], id="range not told"
        ),
        pytest.param(
            [CUT, {"most": 400_000}],
            [None, ON, "bytes=700000-"],
            [AFTER, "cut after 0.7 of 1.0 MB"],
            id="shorter range than asked for",
        ),
        pytest.param([CUT, {"status": 416}], [None, ON, None], [AFTER], id="416"),
    ],
)
def test_a_passing_fault_is_got_over(server, path, capsys, script, asked, told):
    server.script = script.copy()
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["file"]
    assert server.asked == asked
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"{server.url}: downloading"
    for line, phrase, wait in zip(lines[1:], told, download.WAITS[: len(told)], strict=True):
        assert line.startswith(f"{server.url}: ")
        assert phrase in line
        assert line.endswith(f"; trying again in {wait} s")


RESUMES = "try again: it goes on where it stopped, or set ASSETS_DIR"


@pytest.mark.parametrize(
    ("then", "tries", "kept", "told"),
    [
        pytest.param({"status": 404}, 1, 0, "answers 404 Not Found; set ASSETS_DIR", id="404"),
        pytest.param({"status": 403}, 1, 0, "answers 403 Forbidden; set ASSETS_DIR", id="403"),
        pytest.param({"status": 304}, 1, 0, "answers 304 Not Modified", id="304"),
        pytest.param({"status": 503}, 5, 0, "answers 503 .*; try again, or", id="503"),
        pytest.param({"closed": True}, 5, 0, "no answer: Remote end", id="no answer"),
        pytest.param({"silent": True}, 5, 0, "no answer: timed out", id="hangs"),
        pytest.param({"cut": 100_000}, 5, 500_000, f"after 0.5 of 1.0 MB; {RESUMES}", id="cut"),
        pytest.param(
            {"cut": 100_000, "ranges": False}, 5, 100_000, "after 0.1 of 1.0 MB", id="cut, no Range"
        ),
        pytest.param({"content": ALTERED}, 2, 0, f"{WRONG}; try again, or", id="byte altered"),
        pytest.param({"content": b"<p>Log in"}, 2, 0, f"{WRONG}; try again, or", id="another page"),
        pytest.param({"content": b""}, 2, 0, f"{WRONG}; try again, or", id="empty"),
        pytest.param({"content": CONTENT[:-9]}, 2, 0, WRONG, id="truncated"),
    ],
)
def test_a_lasting_fault_ends_in_one_line(server, path, then, tries, kept, told):
    server.then = then
    message = refused(server, path)
    assert message.startswith(f"{server.url}: ")
    assert re.search(told, message)
    assert "ASSETS_DIR" in message
    assert len(server.asked) == tries
    assert path.with_name("file.part").stat().st_size == kept
    server.then = {}
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert server.asked[tries:] == [f"bytes={kept}-" if kept else None]


def test_nobody_listens(server, path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server.url = f"http://127.0.0.1:{taken.getsockname()[1]}/file"
    message = refused(server, path)
    assert message.startswith(f"{server.url}: no answer: Connection refused; try again, or")


def test_waits_grow(server, path, monkeypatch):
    assert list(WAITS) == sorted(set(WAITS))
    waits = (0.5, 1, 2, 4)  # long against what a busy machine adds
    monkeypatch.setattr(download, "WAITS", waits)
    server.then = {"status": 503}
    refused(server, path)
    passed = [late - early for early, late in zip(server.times, server.times[1:], strict=False)]
    for seconds, wait in zip(passed, waits, strict=True):
        assert wait <= seconds < 2 * wait


def test_the_disk_is_full(server, path):
    path.with_name("file.part").symlink_to("/dev/full")
    message = refused(server, path)
    assert message.startswith(f"{path}.part: No space left on device; make room")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("file/in/a/file", "Not a directory"),
        ("", "Is a directory"),
        ("/proc/no/folder/of/mine", "No such file"),
    ],
)
def test_the_folder_cannot_be_written(server, tmp_path, path, name, told):
    with pytest.raises(InputError, match=f"^/.*{told}.*TORCH_HOME") as caught:
        fetch(server, tmp_path / name)
    assert "\n" not in str(caught.value)
    assert server.asked == []
    assert path.read_bytes() == EARLIER


@pytest.mark.parametrize("digits", [8, 64])
def test_what_is_there_and_right_is_not_downloaded(server, path, digits):
    path.write_bytes(CONTENT)
    download.fetch(server.url, path, "sha256", sha256(CONTENT)[:digits])
    assert server.asked == []
    path.rename(path.with_name("file.part"))  # as a run leaves it that is killed at the very end
    download.fetch(server.url, path, "sha256", sha256(CONTENT)[:digits])
    assert server.asked == []
    assert path.read_bytes() == CONTENT


def process(server, path) -> subprocess.Popen:
    """Another process that fetches CONTENT to `path`."""
    script = (
        "import sys; from pathlib import Path; from transfer.download import fetch; "
        "fetch(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])"
    )
    arguments = [server.url, str(path), "sha256", sha256(CONTENT)]
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_come(path, size) -> bool:
    part = path.with_name("file.part")
    return part.exists() and part.stat().st_size == size


def test_killed_in_the_middle_it_goes_on_there(server, path):
    server.script = [{"pause": 600_000}]
    with process(server, path) as killed:
        wait_until(lambda: has_come(path, 600_000))
        killed.send_signal(signal.SIGKILL)
    assert path.read_bytes() == EARLIER
    server.sent = 600_000
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=600000-"]
    wait_until(lambda: server.sent == len(CONTENT))  # it counts after the bytes have left


@pytest.mark.parametrize("killed", [False, True], ids=["both live", "the first is killed"])
def test_two_at_once_download_it_once(server, path, killed):
    server.script = [{"pause": 500_000}]
    with process(server, path) as first:
        wait_until(lambda: has_come(path, 500_000))
        with process(server, path) as second:
            assert "another process is downloading it; waiting" in second.stderr.readline()
            if killed:
                first.kill()
            else:
                server.go_on.set()
            rest = second.stderr.read()
    assert [first.returncode, second.returncode] == [-signal.SIGKILL if killed else 0, 0], rest
    assert server.asked == [None, "bytes=500000-"][: 1 + killed]
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["file"]


def test_the_stage_ends_in_one_line_without_a_network(tmp_path):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    shutil.copytree(ROOT / "cifar10", tmp_path / "cifar10")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
    done = stage(
        tmp_path, "download", PYTHONPATH=str(ROOT), TORCH_HOME=str(tmp_path / "torch"),
        https_proxy=nowhere, no_proxy="",
    )  # fmt: skip
    assert done.returncode == 1
    *told, last = done.stderr.splitlines()
    assert [line.partition("trying again in ")[2] for line in told[1:]] == [
        f"{wait} s" for wait in WAITS
    ]
    assert last.startswith(f"error: {CIFAR10.url}: no answer: Connection refused; try again, or")


@pytest.fixture
def archive(server, batches, tmp_path, monkeypatch):
    """A function that serves an archive as CIFAR-10, with more members added or altered."""
    monkeypatch.delenv("ASSETS_DIR", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(CIFAR10, "url", server.url)
    (tmp_path / "cifar10").mkdir()
    shutil.copy(batches / "MD5SUMS", tmp_path / "cifar10")
    monkeypatch.chdir(tmp_path)

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


def test_cifar10_is_downloaded_once_through_a_cut_and_unpacked(server, archive, batches, tmp_path):
    kept = archive()
    server.script = [{"cut": 1000}]
    splits, classes = data.read_cifar10("cifar10")
    expected, names = data.read_cifar10(str(batches))
    assert classes == names
    for name, split in expected.items():
        assert torch.equal(splits[name].images, split.images)
        assert torch.equal(splits[name].labels, split.labels)
    assert server.asked == [None, "bytes=1000-"]
    assert os.listdir(tmp_path / "temporary") == []
    data.read_cifar10("cifar10")
    assert len(server.asked) == 2
    kept.write_bytes(b"damaged")
    data.read_cifar10("cifar10")
    assert len(server.asked) == 3


def member(name, kind=tarfile.REGTYPE, target="") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([member("../evil")], id="above"),
        pytest.param([member("cifar-10-batches-py/../../evil")], id="above, later"),
        pytest.param([member("{tmp}/evil")], id="absolute"),
        pytest.param([member("link", tarfile.SYMTYPE, ".."), member("link/evil")], id="link"),
        pytest.param(
            [member("link", tarfile.SYMTYPE, "{tmp}"), member("link/evil")], id="absolute link"
        ),
        pytest.param(
            [member("link", tarfile.LNKTYPE, "../../file"), member("link")], id="hard link"
        ),
        pytest.param([member("evil", tarfile.FIFOTYPE)], id="pipe"),
    ],
)
def test_an_archive_that_leaves_its_folder_is_refused(archive, path, tmp_path, members):
    for info in members:
        info.name = info.name.replace("{tmp}", str(tmp_path))
        info.linkname = info.linkname.replace("{tmp}", str(tmp_path))
    kept = archive(members)
    with pytest.raises(InputError, match=f"^{kept}: cannot be unpacked") as caught:
        data.read_cifar10("cifar10")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.rglob("*evil*")) == []
    assert os.listdir(tmp_path / "temporary") == []
    assert path.read_bytes() == EARLIER


@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(lambda content: content[:-50_000], id="truncated"),
        pytest.param(lambda content: content[:9] + bytes(9) + content[18:], id="altered"),
        pytest.param(lambda c: c[:50_000] + b"\xff" * 999 + c[50_999:], id="altered inside"),
        pytest.param(lambda content: b"no archive", id="no archive"),
        pytest.param(lambda content: b"", id="empty"),
    ],
)
def test_a_damaged_archive_is_named(archive, tmp_path, alter):
    kept = archive(alter=alter)
    with pytest.raises(InputError, match=f"^{kept}: cannot be unpacked") as caught:
        data.read_cifar10("cifar10")
    assert "\n" not in str(caught.value)
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
        return model.pretrained("squeezenet1_1", "IMAGENET1K_V1")["weight"].tolist()

    server.script = [{"cut": 500}]
    assert weights() == [0, 1, 2, 3, 4]
    assert server.asked == [None, "bytes=500-"]
    assert weights() == [0, 1, 2, 3, 4]
    assert len(server.asked) == 2
    path.write_bytes(b"damaged")
    server.script = [{"status": 404}]
    with pytest.raises(InputError, match=f"^{url}: the server answers 404"):
        weights()
    assert path.read_bytes() == b"damaged"
    assert weights() == [0, 1, 2, 3, 4]
    assert path.read_bytes() == server.content
