import os
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants

from rlhf_jax import hub
from rlhf_jax.errors import InputError
from tests import hub_server

MODEL = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}
OTHER = "f" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and the client offline."""
    hub._fetch.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "cache"
    hub._fetch.cache_clear()


@pytest.fixture(scope="module")
def running():
    with hub_server.serving() as server:
        yield server


def connect(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    huggingface_hub.utils.close_session()
    hub._fetch.cache_clear()


@pytest.fixture
def server(running, monkeypatch):
    """A Hub without repositories, and a client that reaches it."""
    for kept in (running.commits, running.branches, running.gated, running.breaks):
        kept.clear()
    connect(monkeypatch, running.endpoint)
    return running


def refusal(name):
    with pytest.raises(InputError) as raised:
        hub.local(name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("EleutherAI/pythia-1b", True),
        ("EleutherAI/pythia-1b@step1000", True),
        ("a/b@refs/pr/3", True),
        ("a/b-GGUF/b.Q4_K_M.gguf", True),
        ("a/b@main/b.gguf", True),
        ("gpt2", False),
        ("runs/sft/model", False),
        ("/a/b", False),
        ("./a/b", False),
        ("../b", False),
        ("a/b.gguf/c", False),
        ("a/b@", False),
    ],
)
def test_what_looks_like_a_name(path, expected):
    assert hub.is_name(path) == expected


def test_what_is_here_is_no_name(tmp_path):
    (tmp_path / "runs").mkdir()
    assert not hub.is_name("runs/model") and hub.local("runs/model") == hub.local("runs/model")
    assert str(hub.local("runs/model")) == "runs/model"


def test_a_snapshot_in_the_cache_needs_no_network(cache):
    snapshot = hub_server.cached(cache, "owner/tiny", MODEL)
    assert hub.local("owner/tiny") == snapshot and hub.commit("owner/tiny") == hub_server.SHA
    assert hub.local(f"owner/tiny@{hub_server.SHA}") == snapshot


def test_offline_without_a_snapshot(cache):
    expected = f"owner/tiny is no path here, nor in {cache}, and HF_HUB_OFFLINE is set"
    assert refusal("owner/tiny") == f"{expected}: correct it, or run again without HF_HUB_OFFLINE"


def test_no_network_and_no_snapshot(cache, monkeypatch):
    connect(monkeypatch, "http://127.0.0.1:9")
    said = refusal("owner/tiny")
    assert said.startswith(
        f"owner/tiny is no path here, nor in {cache}, and http://127.0.0.1:9 gives ConnectionRefused"
    )
    assert said.endswith(": correct it, or run again with a network")
    snapshot = hub_server.cached(cache, "owner/tiny", MODEL)
    assert hub.local("owner/tiny") == snapshot


def test_a_model_is_fetched_once(server, cache):
    server.push("owner/tiny", {**MODEL, "pytorch_model.bin": b"pickle", "onnx/model.safetensors": b"copy"})
    folder = hub.local("owner/tiny")
    assert sorted(path.name for path in folder.iterdir()) == sorted(MODEL)
    assert (folder / "model.safetensors").read_bytes() == b"weights" and folder.is_relative_to(cache)
    server.push("owner/tiny", MODEL, sha=OTHER)
    assert hub.commit("owner/tiny") == hub_server.SHA  # as long as this process runs
    hub._fetch.cache_clear()
    assert hub.commit("owner/tiny") == OTHER and hub.commit(f"owner/tiny@{hub_server.SHA}") == hub_server.SHA


def test_a_revision_and_a_file_of_gguf(server):
    server.push("owner/tiny", {"tiny.gguf": b"main"})
    server.push("owner/tiny", {"tiny.gguf": b"step"}, branch="step1000", sha=OTHER)
    file = hub.local("owner/tiny@step1000/tiny.gguf")
    assert file.read_bytes() == b"step" and hub.commit("owner/tiny@step1000/tiny.gguf") == OTHER
    assert hub.local("owner/tiny/tiny.gguf").read_bytes() == b"main"
    said = refusal("owner/tiny/other.gguf")
    assert said == f"owner/tiny/other.gguf: owner/tiny has no file other.gguf at {server.endpoint}: name another"
    said = refusal("owner/tiny@step9")
    assert said == f"owner/tiny@step9: owner/tiny has no revision step9 at {server.endpoint}: name another"
    said = refusal("owner/tiny")
    assert "lacks config.json and 1 more; delete" in said and said.endswith("a GGUF file of it as owner/tiny/FILE.gguf")


def test_a_repository_that_is_not_there(server):
    assert refusal("owner/none") == (
        f"owner/none is no path here, and {server.endpoint} has no such repository, or none that you may read:"
        " correct it; a private one needs `hf auth login` or HF_TOKEN"
    )


def test_a_gated_repository(server):
    server.push("owner/gated", MODEL)
    server.gated.add("owner/gated")
    assert refusal("owner/gated") == (
        f"owner/gated is gated: accept its terms at {server.endpoint}/owner/gated, then log in with `hf auth login` or"
        " set HF_TOKEN"
    )


def test_a_half_downloaded_snapshot(server, cache, monkeypatch):
    """It is named as such while the Hub cannot be reached, and completed as soon as it can be."""
    shards = {"a.safetensors": b"one" * 99, "b.safetensors": b"two" * 99}
    index = b'{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    server.push("owner/tiny", {"config.json": b"{}", "model.safetensors.index.json": index, **shards})
    folder = hub.local("owner/tiny")
    (folder / "b.safetensors").unlink()
    hub._fetch.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal("owner/tiny") == (
        f"owner/tiny is half downloaded to {folder}, and HF_HUB_OFFLINE is set: run again without HF_HUB_OFFLINE to"
        " complete it"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert (hub.local("owner/tiny") / "b.safetensors").read_bytes() == b"two" * 99


def test_a_snapshot_half_downloaded_by_an_earlier_client(cache):
    index = b'{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "a.safetensors": b"one"}
    folder = hub_server.cached(cache, "owner/tiny", files)
    assert refusal("owner/tiny").startswith(
        f"owner/tiny is half downloaded, or no model in safetensors: {folder} lacks b.safetensors; delete that folder"
    )


@pytest.mark.slow
def test_the_variables_of_the_client_count(server, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, as they are read when a process starts."""
    server.push("owner/tiny", MODEL)
    code = "from rlhf_jax import hub; print(hub.commit('owner/tiny'))"

    def run(**variables):
        own = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        root = os.path.dirname(os.path.dirname(hub.__file__))
        environment = os.environ | own | {"PYTHONPATH": root} | variables
        environment.pop("HF_HUB_CACHE", None)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    offline = run(HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE="1")
    assert offline.startswith("rlhf_jax.errors.InputError: owner/tiny is no path here, nor in")
    assert run(HF_ENDPOINT=server.endpoint) == hub_server.SHA
    assert run(HF_HUB_OFFLINE="1") == hub_server.SHA
