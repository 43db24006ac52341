"""Models by their names on the Hugging Face Hub, from a local server that answers as the Hub does.

The server sends files of small real models. huggingface_hub is the real one.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants

import lsjax
from lsjax.io.convert import convert
from lsjax.io.hub import parse_hub_name
from lsjax.io.huggingface import write_huggingface
from tests.conftest import process_environment
from tests.helpers.hub_server import HubServer
from tests.io.test_gguf import write_gguf
from tests.io.test_gguf_metadata import split
from tests.io.test_huggingface import RECORDED

NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Returns a folder that lsjax wrote, with what repositories hold beside a model."""
    folder = tmp_path_factory.mktemp("repository") / "llama"
    convert(RECORDED / "llama31", folder, "huggingface")
    (folder / "onnx").mkdir()
    for name in ("pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "README.md", ".gitattributes"):
        (folder / name).write_bytes(b"x" * 1000)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Returns a server that huggingface_hub takes for the Hub, with a cache of its own."""
    server = HubServer()
    use_hub(monkeypatch, server.endpoint, tmp_path / "hf")
    yield server
    server.close()


def use_hub(monkeypatch, endpoint: str, home: Path) -> None:
    """Sets what huggingface_hub reads from the environment when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "harnesses.json"), raising=False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def assert_same(model: lsjax.Model, folder: Path) -> None:
    expected = lsjax.load(folder)
    assert model.config == expected.config
    assert model.tokenizer.backend.to_str() == expected.tokenizer.backend.to_str()
    jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)


def test_a_hub_name_loads_the_same_model_and_only_its_files(hub, llama):
    hub.repositories["org/llama"] = {"main": llama}
    model = lsjax.load("org/llama")
    assert_same(model, llama)
    assert model.path == "org/llama"
    assert hub.downloaded() == NEEDED
    asked = {path.rsplit("/", 1)[1] for method, path in hub.requests if method == "HEAD"}
    assert not asked & {"pytorch_model.bin", "model.onnx", "README.md"}


def test_the_config_alone_is_fetched_for_a_shape(hub, llama):
    hub.repositories["org/llama"] = {"main": llama}
    assert lsjax.read_model_config("org/llama") == lsjax.read_model_config(llama)
    assert hub.downloaded() == {"config.json"}


def test_all_files_that_an_index_names_are_fetched(hub, llama, tmp_path):
    model = lsjax.load(llama)
    folder = tmp_path / "sharded"
    folder.mkdir()
    write_huggingface(folder, model.config, model.params, model.tokenizer, shard_bytes=30_000)
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 2
    hub.repositories["org/sharded"] = {"main": folder}
    assert_same(lsjax.load("org/sharded"), llama)
    assert shards < hub.downloaded()


def test_a_revision_is_a_branch_or_a_commit(hub, llama):
    hub.repositories["org/llama"] = {"main": llama, "refs/pr/1": RECORDED / "smollm2"}
    assert_same(lsjax.load("org/llama@refs/pr/1"), RECORDED / "smollm2")
    assert_same(lsjax.load(f"org/llama@{hub.commit('org/llama', 'main')}"), llama)


def test_a_changed_branch_is_fetched_and_what_stayed_is_not(hub, llama, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(llama, folder)
    hub.repositories["org/llama"] = {"main": folder}
    lsjax.load("org/llama")
    shutil.copy(RECORDED / "llama31" / "model.safetensors", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    hub.requests.clear()
    assert lsjax.load("org/llama").tokenizer.settings["chat_template"] == "{{ messages }}"
    assert "tokenizer_config.json" in hub.downloaded()
    assert "tokenizer.json" not in hub.downloaded()


def test_gguf_files_whole_and_split(hub, tmp_path):
    folder = tmp_path / "gguf"
    (folder / "parts").mkdir(parents=True)
    path = write_gguf(folder / "m.Q8_0.gguf", "llama32")
    parts = [part.name for part in split(folder / "parts")]
    hub.repositories["org/gguf"] = {"main": folder, "v1": folder}
    assert_same(lsjax.load("org/gguf:m.Q8_0.gguf"), path)
    assert hub.downloaded() == {path.name}
    assert lsjax.read_model_config("org/gguf@v1:m.Q8_0.gguf") == lsjax.read_model_config(path)
    hub.requests.clear()
    assert_same(lsjax.load(f"org/gguf:parts/{parts[1]}"), folder / "parts" / parts[0])
    assert hub.downloaded() == set(parts)


@pytest.mark.parametrize("reason", ["offline", "server is down", "server fails"])
def test_a_cached_model_needs_no_network(hub, llama, monkeypatch, reason):
    hub.repositories["org/llama"] = {"main": llama}
    lsjax.load("org/llama")
    hub.requests.clear()
    if reason == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif reason == "server fails":
        hub.status = 503
    else:
        hub.close()
    assert_same(lsjax.load("org/llama"), llama)
    assert not hub.downloaded()
    assert bool(hub.requests) == (reason == "server fails")


def test_a_cached_model_asks_only_whether_it_has_changed(hub, llama):
    hub.repositories["org/llama"] = {"main": llama}
    lsjax.load("org/llama")
    hub.requests.clear()
    lsjax.load("org/llama")
    assert len(hub.requests) <= 2  # the list of files, and the commit of the first one
    assert not hub.downloaded()


def test_a_gated_model_opens_with_a_token(hub, llama, monkeypatch):
    hub.repositories["org/llama"] = {"main": llama}
    hub.gated, hub.tokens = {"org/llama"}, {"good"}
    monkeypatch.setenv("HF_TOKEN", "good")
    assert_same(lsjax.load("org/llama"), llama)


def test_a_path_that_exists_is_never_a_hub_name(hub, llama, tmp_path, monkeypatch):
    shutil.copytree(llama, tmp_path / "org" / "llama")
    monkeypatch.chdir(tmp_path)
    assert_same(lsjax.load("org/llama"), llama)
    with pytest.raises(lsjax.UserError, match=r"no model at org: it has no config\.json"):
        lsjax.load("org")
    assert not hub.requests


@pytest.mark.parametrize(
    "path", ["demo", "./runs/demo", "../x/y", "runs/demo/x", "/a/b", "a/.b", "a/b@", "a/b:", "a b/c"]
)
def test_other_paths_are_no_hub_names(path):
    assert parse_hub_name(path) is None


def folder_of(llama: Path, folder: Path, *names: str, **more: str) -> Path:
    """Copies some files of a model, and writes files with the given content."""
    folder.mkdir()
    for name in names:
        shutil.copy(llama / name, folder)
    for name, content in more.items():
        (folder / name.replace("_dot_", ".")).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("path", "message"),
    {
        "org/nothing": r"no model at org/nothing: no such file or folder here, and http://127.0.0.1:\d+ shows no model",
        "org/llama@v9": "org/llama on the Hub has no revision v9: give one of its branches",
        "org/llama:m.gguf": "org/llama on the Hub has no file m.gguf$",
        "org/gguf:m.gguf": "org/gguf on the Hub has no file m.gguf; its GGUF files: a.gguf, b.gguf",
        "org/gguf": "org/gguf on the Hub holds GGUF files: choose one, as in org/gguf:a.gguf; all: a.gguf, b.gguf",
        "org/gguf:README.md": "in a Hub name only a .gguf file follows the colon",
        "org/pickle": r"weights in pytorch_model.bin, a pickle.*AutoModelForCausalLM.from_pretrained\('org/pickle'\)",
        "org/slow": "org/slow on the Hub has no tokenizer.json, only tokenizer.model: convert it",
        "org/adapter": "org/adapter on the Hub has no config.json, but an adapter of PEFT",
        "org/empty": "org/empty on the Hub has no weights: neither model.safetensors nor",
        "org/gpt2": "lsjax reads only LlamaForCausalLM",
        "org/gated": r"org/gated is gated: accept its conditions at http://.*/org/gated, then log in",
        "org/no--name": "no model at org/no--name: .* no name of a model on the Hub",
    }.items(),
)
def test_one_line_says_what_is_wrong_and_nothing_large_is_fetched(hub, llama, tmp_path, path, message):
    small = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    content = {
        "llama": llama,
        "gated": llama,
        "gguf": folder_of(llama, tmp_path / "g", a_dot_gguf="", b_dot_gguf="", README_dot_md=""),
        "pickle": folder_of(llama, tmp_path / "p", *small, optimizer_dot_pt="", pytorch_model_dot_bin=""),
        "slow": folder_of(llama, tmp_path / "s", "config.json", "model.safetensors", tokenizer_dot_model=""),
        "adapter": folder_of(llama, tmp_path / "a", adapter_config_dot_json="{}"),
        "empty": folder_of(llama, tmp_path / "e", *small),
        "gpt2": folder_of(llama, tmp_path / "n", "model.safetensors", config_dot_json='{"model_type": "gpt2"}'),
    }
    hub.repositories |= {f"org/{name}": {"main": folder} for name, folder in content.items()}
    hub.gated = {"org/gated"}
    with pytest.raises(lsjax.UserError, match=message) as caught:
        lsjax.load(path)
    assert "\n" not in str(caught.value)
    assert not hub.downloaded() & {"model.safetensors", "pytorch_model.bin", "a.gguf", "b.gguf"}


@pytest.mark.parametrize(
    ("token", "path", "message"),
    [
        ("no-access", "org/nothing", "shows no model org/nothing"),
        ("no-access", "org/gated", "org/gated is gated: accept its conditions"),
        ("wrong", "org/llama", "does not accept your token: correct HF_TOKEN"),
    ],
)
def test_what_a_token_does_not_open(hub, llama, monkeypatch, token, path, message):
    hub.repositories |= {"org/llama": {"main": llama}, "org/gated": {"main": llama}}
    hub.gated = {"org/gated"}
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(lsjax.UserError, match=message):
        lsjax.load(path)


def test_offline_a_model_that_is_not_whole_in_the_cache_says_so(hub, llama, monkeypatch):
    hub.repositories["org/llama"] = {"main": llama}
    message = "no model at org/llama: .* does not hold all of it; unset HF_HUB_OFFLINE"
    for _ in range(2):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(lsjax.UserError, match=message):
            lsjax.load("org/llama")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        lsjax.read_model_config("org/llama")  # now config.json is there


def test_without_a_network_or_with_a_failing_hub_the_message_says_so(hub):
    hub.status = 503
    with pytest.raises(lsjax.UserError, match=r"http://127.0.0.1:\d+ answered with status 503"):
        lsjax.load("org/llama")
    hub.close()
    with pytest.raises(
        lsjax.UserError, match=r"no such file or folder here, and http://.* cannot be reached \(.*check"
    ):
        lsjax.load("org/llama")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_and_a_read_only_one(hub, llama, monkeypatch, number):
    hub.repositories["org/llama"] = {"main": llama}

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    message = rf"cannot write to huggingface_hub's cache .*/hf/hub \({os.strerror(number)}\): free space .* HF_HOME"
    with pytest.raises(lsjax.UserError, match=message):
        lsjax.load("org/llama")


@pytest.mark.slow
def test_the_command_line_obeys_the_environment(hub, llama, tmp_path):
    """The only test here in which huggingface_hub itself reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE."""
    hub.repositories["org/llama"] = {"main": llama}
    command = [sys.executable, "-m", "lsjax", "convert", "--from=org/llama"]
    online = process_environment(HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
    done = subprocess.run([*command, f"--to={tmp_path}/a"], env=online, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bars where there is no terminal
    assert_same(lsjax.load(tmp_path / "a"), llama)
    offline = online | {"HF_HOME": str(tmp_path / "other"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, f"--to={tmp_path}/b"], env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no model at org/llama" in done.stderr
    assert done.stderr.count("\n") == 1
