"""`push`: what is uploaded where, with a stand-in for the Hub; refused without a login before anything is written."""

from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner

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
    ],
    ids=["repo", "type", "name"],
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
