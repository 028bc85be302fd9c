import re
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from fitune.config import hub
from fitune.config.model_shapes import find_shape
from fitune.errors import FituneError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "meta-llama/Meta-Llama-3-8B"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": torch.arange(4096, dtype=torch.float32)}, folder / "model.safetensors")
    return folder


def _hub_answers(monkeypatch, answer):
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def _http(kind, status):
    """The Hub's refusal, whichever library it came through: huggingface_hub has changed it twice."""
    return kind("refused", response=SimpleNamespace(status_code=status, headers={}, request=None))


def test_a_local_folder_is_taken_as_it_is(model):
    assert hub.local_folder(str(model)) == model
    assert hub.local_config(str(model)) == model


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("run.yaml", "it is a run's folder: merge it first, python cli.py merge {0} --output models/merged, and give"),
        ("adapter_config.json", "it is an adapter's folder: merge it first, python cli.py merge {0} --output models/"),
        ("model/config.json", "give {0}/model"),
        ("other.json", "give a folder with config.json and *.safetensors"),
    ],
)
def test_what_training_left_is_no_base_and_the_way_to_one_is_said(file, said, tmp_path):
    """As a base: of `plan`, which wants its sizes, and of `train`."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    (tmp_path / "adapter").mkdir()
    for find in (hub.local_folder, find_shape):
        with pytest.raises(UsageError, match=re.escape(said.format(tmp_path))):
            find(str(tmp_path))


@pytest.mark.parametrize(
    "given, said",
    [
        ("no-such-model", "no such folder, and not a Hugging Face id"),
        ("./a/b", "no such folder, and not a Hugging Face id"),
        ("a/b/c", "no such folder, and not a Hugging Face id"),
        (__file__, "is a file"),
    ],
)
def test_what_is_neither_folder_nor_id_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        hub.local_folder(given)


def test_what_a_local_folder_lacks_is_named(model):
    with pytest.raises(UsageError, match="has no revision 'main'"):
        hub.local_folder(str(model), "main")
    (model / "model.safetensors").unlink()
    assert hub.local_config(str(model)) == model
    with pytest.raises(UsageError, match=r"\*\.safetensors are missing"):
        hub.local_folder(str(model))
    (model / "config.json").unlink()
    with pytest.raises(UsageError, match=r"config\.json is missing"):
        hub.local_config(str(model))


def test_only_needed_files_are_fetched_and_no_token_is_passed(model, monkeypatch):
    calls = _hub_answers(monkeypatch, model)
    assert hub.local_folder(MODEL, COMMIT) == model
    assert hub.local_config(MODEL) == model
    (_, weights), (_, config) = calls
    assert weights["revision"] == COMMIT
    assert "*.safetensors" in weights["allow_patterns"]
    assert "*.safetensors" not in config["allow_patterns"]
    listing = ["config.json", "model-00001-of-00002.safetensors", "original/params.json", "pytorch_model.bin", "x.pth"]
    fetched = huggingface_hub.utils.filter_repo_objects(
        listing, allow_patterns=weights["allow_patterns"], ignore_patterns=weights["ignore_patterns"]
    )
    assert list(fetched) == listing[:2]
    assert not any("token" in options for _, options in calls)


@pytest.mark.parametrize(
    "error, kind, said",
    [
        (
            _http(errors.GatedRepoError, 403),
            UsageError,
            f"accept the licence at https://huggingface.co/{MODEL} and run `hf",
        ),
        (_http(errors.RepositoryNotFoundError, 401), UsageError, "no such folder, nor found at"),
        (_http(errors.RevisionNotFoundError, 404), UsageError, "no revision 'v9'"),
        (_http(errors.HfHubHTTPError, 401), UsageError, "run `hf auth login`"),
        (errors.LocalEntryNotFoundError("offline\nlong story"), UsageError, "the Hub is out of reach"),
        (OSError(28, "No space left on device"), FituneError, "No space left on device"),
    ],
    ids=["gated", "not found", "revision", "login", "offline", "disk"],
)
def test_hub_errors_become_one_line(monkeypatch, error, kind, said):
    _hub_answers(monkeypatch, error)
    with pytest.raises(FituneError) as caught:
        hub.local_folder(MODEL, "v9")
    assert type(caught.value) is kind
    assert said in str(caught.value)
    assert MODEL in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_and_not_cached(tmp_path):
    """The real huggingface_hub, told to stay offline, with an empty cache."""
    code = (
        f"from fitune.config.hub import local_config\n"
        f"try: local_config('{MODEL}')\nexcept Exception as e: print(repr(e))"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "UsageError" in done.stdout
    assert "not wholly in the Hub's cache" in done.stdout


def test_a_repository_without_safetensors_is_refused(model, monkeypatch):
    (model / "model.safetensors").unlink()
    _hub_answers(monkeypatch, model)
    with pytest.raises(UsageError, match=r"has no \*\.safetensors"):
        hub.local_folder(MODEL)


def test_commit_is_read_from_the_cache_path(tmp_path):
    snapshot = tmp_path / "models--meta-llama--Meta-Llama-3-8B" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    assert hub.resolved_commit(snapshot) == COMMIT
    assert hub.resolved_commit(tmp_path / "link") == COMMIT
    assert hub.resolved_commit(tmp_path) is None


def test_importing_hub_loads_nothing_heavy():
    code = (
        "import sys, fitune.config.hub\n"
        "print([m for m in ('torch', 'huggingface_hub', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "[]"
