"""`push`: what is uploaded where, with a stand-in for the Hub; refused without a login before anything is written."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import huggingface_hub
import pytest
from click.testing import CliRunner
from hub_server import TOKEN, HubServer

from fitune.cli import cli


class Hub:
    """Notes what it is asked for."""

    def __init__(self):
        self.calls, self.files = [], {}

    def whoami(self):
        return {"name": "me"}

    def create_repo(self, repo, **options):
        self.calls.append((repo, options))
        return f"hub/{repo}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.files[repo_id] = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return made


def push(*words):
    return CliRunner().invoke(cli, ["push", *map(str, words)])


def test_an_adapter_goes_up_as_it_is_private_under_the_users_name(own_adapter, hub):
    outcome = push(own_adapter)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout == "pushed: hub/me/own_adapter\n"
    assert hub.calls == [("me/own_adapter", {"private": True, "exist_ok": True})]
    assert hub.files["me/own_adapter"] == {file.name: file.read_bytes() for file in own_adapter.iterdir()}


def test_merged_it_is_a_whole_model_with_a_card_of_which_nothing_stays_here(base, own_adapter, hub):
    before = set(own_adapter.parent.iterdir())
    outcome = push(own_adapter, "--merged", "--base", base, "--repo", "org/mine", "--public")
    assert outcome.exit_code == 0, outcome.output
    assert hub.calls == [("org/mine", {"private": False, "exist_ok": True})]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(hub.files["org/mine"])
    assert set(own_adapter.parent.iterdir()) == before


def test_without_a_login_nothing_is_written_or_sent(own_adapter, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    before = set(own_adapter.parent.rglob("*"))
    outcome = push(own_adapter, "--merged")
    assert outcome.exit_code == 2
    assert outcome.stderr == "error: push needs a login: hf auth login, with a token that may write\n"
    assert set(own_adapter.parent.rglob("*")) == before and not hub.calls


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--repo", "a/b/c"), "--repo a/b/c: "),
        (("--gguf", "q4"), "the converter writes"),
        (("--repo", "-x-"), "--repo"),
        (("--base", "some/model"), "--base is for what is merged: add --merged or --gguf TYPE"),
        (("--onto", "original"), "--onto is for what is merged"),
    ],
    ids=["repo", "type", "name", "base without merging", "onto without merging"],
)
def test_impossible_wishes_are_refused_before_anything_is_sent(own_adapter, hub, words, said):
    outcome = push(own_adapter, *words)
    assert outcome.exit_code == 2 and said in outcome.stderr
    assert not hub.calls


def test_a_refusal_by_the_hub_is_one_line_without_the_token(own_adapter, hub, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("403: no right to write\nmore")

    monkeypatch.setattr(hub, "create_repo", refuse)
    outcome = push(own_adapter)
    assert outcome.exit_code == 1
    assert outcome.stderr == "error: push to me/own_adapter: 403: no right to write\n"
    assert "hf_secret" not in outcome.output


@pytest.fixture
def server():
    with HubServer() as made:
        thread = Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()


def push_over_http(server, tmp_path, token, *words):
    """In a process of its own: huggingface_hub reads where the Hub is when it is imported."""
    place = {
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
    }
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | place
    command = [sys.executable, "-m", "fitune", "push", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_real_client_sends_every_byte(own_adapter, base, server, tmp_path):
    """huggingface_hub over HTTP: an adapter as it lies there, then a merged model."""
    done = push_over_http(server, tmp_path, TOKEN, own_adapter, "--repo", "mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"pushed: {server.address}/me/mine\n"
    assert server.created == [{"name": "mine", "organization": "me", "visibility": "private"}]
    sent = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in own_adapter.iterdir()}
    assert server.files == sent
    server.files.clear()
    done = push_over_http(
        server, tmp_path, TOKEN, own_adapter, "--merged", "--base", base, "--repo", "mine", "--public"
    )
    assert done.returncode == 0, done.stderr
    assert server.created[1]["visibility"] == "public"
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(server.files)


def test_a_hub_that_cannot_be_reached_is_one_line(own_adapter, tmp_path):
    done = push_over_http(SimpleNamespace(address="http://127.0.0.1:9"), tmp_path, TOKEN, own_adapter)
    assert done.returncode == 1
    assert done.stderr.startswith("error: push: the Hub cannot be reached: ") and done.stderr.count("\n") == 1


def test_a_token_that_the_hub_does_not_know_is_one_line(own_adapter, server, tmp_path):
    done = push_over_http(server, tmp_path, "hf_wrong", own_adapter)
    assert done.returncode == 2
    assert done.stderr == "error: push: the Hub refuses the login's token: hf auth login, with one that may write\n"
    assert not server.created and not server.files
