"""Data and models pass through a real S3 server, on this machine's loopback alone."""

import subprocess

import pytest
import requests
from helpers import commit, dvc, ran
from moto.server import ThreadedMotoServer

from tools.isolated import environment
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
    requests.put(f"{url}/bucket", timeout=10).raise_for_status()
    yield url
    server.stop()


def git(*arguments) -> None:
    subprocess.run(["git", *arguments], check=True)


def test_a_clone_pulls_from_s3_and_has_nothing_to_run(project, s3, tmp_path):
    """... and a model comes by its name and version, without the rest of the project."""
    dvc(project, "remote", "add", "--default", "storage", "s3://bucket/path")
    dvc(project, "remote", "modify", "storage", "endpointurl", s3)
    commit(project, "a remote")
    git("-C", project, "config", "user.name", "test")  # gto asks for both
    git("-C", project, "config", "user.email", "test@localhost")
    register = ["gto", "register", "finetuned", "--version", "v1.0.0"]
    subprocess.run(register, cwd=project, env=environment(), check=True)
    dvc(project, "push")
    assert b"<Key>path/files/md5/" in requests.get(f"{s3}/bucket", timeout=10).content

    models = {mode: (project / f"models/{mode}.safetensors").read_bytes() for mode in MODES}
    (project / "models/finetuned.safetensors").write_bytes(b"a later model, to be told apart")
    dvc(project, "commit", "--force", "train@finetuned")
    commit(project, "later")
    # A bare repository has no cache: what it gives out comes from the server.
    git("clone", "-q", "--bare", project, tmp_path / "bare")

    clone = tmp_path / "clone"
    git("clone", "-q", "--branch", "finetuned@v1.0.0", tmp_path / "bare", clone)
    assert not (clone / "models").exists()
    dvc(clone, "pull")
    for mode, model in models.items():
        assert (clone / f"models/{mode}.safetensors").read_bytes() == model
    assert "up to date" in dvc(clone, "status")
    assert ran(dvc(clone, "repro")) == []
    git("-C", clone, "diff", "--exit-code")

    get = ["artifacts", "get", str(tmp_path / "bare"), "finetuned", "--rev", "v1.0.0"]
    dvc(tmp_path, *get, "--out", "fetched")
    assert (tmp_path / "fetched").read_bytes() == models["finetuned"]
