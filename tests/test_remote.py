"""Data and models pass through a real S3 server, on this machine's loopback alone."""

from urllib.request import Request, urlopen

import pytest
from helpers import commit, dvc, python, ran
from moto.server import ThreadedMotoServer

from tools.isolated import git
from transfer.common.settings import MODES


@pytest.fixture
def s3(monkeypatch) -> str:
    """The address of an S3 server with an empty bucket named `bucket`."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",  # ask no server but this one for credentials
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    urlopen(Request(f"{url}/bucket", method="PUT"), timeout=60).close()
    yield url
    server.stop()


def test_a_clone_pulls_from_s3_and_has_nothing_to_run(project, s3, tmp_path):
    """... and a model comes by its name and version, without the rest of the project."""
    dvc(project, "remote", "add", "--default", "storage", "s3://bucket/path")
    dvc(project, "remote", "modify", "storage", "endpointurl", s3)
    commit(project, "a remote")
    git(project, "config", "user.name", "test")  # gto asks for both
    git(project, "config", "user.email", "test@localhost")
    done = python(project, "-m", "gto.cli", "register", "finetuned", "--version", "v1.0.0")
    assert done.returncode == 0, done.stderr
    dvc(project, "push")
    with urlopen(f"{s3}/bucket", timeout=60) as listing:
        assert b"<Key>path/files/md5/" in listing.read()

    models = {mode: (project / f"models/{mode}.safetensors").read_bytes() for mode in MODES}
    (project / "models/finetuned.safetensors").write_bytes(b"a later model, to be told apart")
    dvc(project, "commit", "--force", "train@finetuned")
    commit(project, "later")
    # A bare repository has no cache: what it gives out comes from the server.
    git(tmp_path, "clone", "--quiet", "--bare", str(project), "bare")

    git(tmp_path, "clone", "--quiet", "--branch", "finetuned@v1.0.0", "bare", "clone")
    clone = tmp_path / "clone"
    assert not (clone / "models").exists()
    dvc(clone, "pull")
    for mode, model in models.items():
        assert (clone / f"models/{mode}.safetensors").read_bytes() == model
    assert "up to date" in dvc(clone, "status")
    assert ran(dvc(clone, "repro")) == []
    assert git(clone, "status", "--porcelain") == ""

    get = ["artifacts", "get", str(tmp_path / "bare"), "finetuned", "--rev", "v1.0.0"]
    dvc(tmp_path, *get, "--out", "fetched")
    assert (tmp_path / "fetched").read_bytes() == models["finetuned"]
