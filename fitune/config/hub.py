"""Where a model lies: a local folder, taken as it is, or a Hugging Face Hub id, in the Hub's cache or downloaded to it.

The login is huggingface_hub's own (HF_TOKEN, or `hf auth login`); no token passes through here.
It stands in config/ because `prepare` and the checks before a start need it too, not only what reads weights.
"""

import re
from itertools import pairwise
from pathlib import Path

from fitune.config.adapter_folder import is_adapter
from fitune.config.command_name import command
from fitune.errors import FituneError, UsageError

CONFIG_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*", "USE_POLICY*", "NOTICE*"]
WEIGHT_AND_CONFIG_FILES = ["*.safetensors", *CONFIG_FILES]
NEVER = ["original/*", "*.bin", "*.pth", "*.pt", "*.ckpt"]
"Copies of the weights in other formats: twice the bytes, and pickles."

_COMMIT = re.compile(r"[0-9a-f]{40}")


def local_folder(model: str, revision: str | None = None) -> Path:
    """The folder with a model's config, tokenizer and safetensors, downloaded first where `model` is a Hub id.

    Raises UsageError in one line that says what to do: not a model folder, not a Hub id, not found, no access, offline.
    """
    return _find(model, revision, WEIGHT_AND_CONFIG_FILES)


def local_config(model: str, revision: str | None = None) -> Path:
    """Like `local_folder`, but fetches a few megabytes at most: config and tokenizer files, no weights."""
    return _find(model, revision, CONFIG_FILES)


def resolved_commit(folder: Path) -> str | None:
    """The Hub commit that `folder` is a snapshot of, or None for any other folder."""
    parts = Path(folder).resolve().parts
    for parent, name in pairwise(parts):
        if parent == "snapshots" and _COMMIT.fullmatch(name):
            return name
    return None


def _find(model: str, revision: str | None, patterns: list[str]) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return _checked_folder(path, revision, patterns)
    if path.exists():
        raise UsageError(f"{model}: is a file; give the model's folder or a Hugging Face id")
    if not _looks_like_hub_id(model):
        raise UsageError(f"{model}: no such folder, and not a Hugging Face id like meta-llama/Meta-Llama-3-8B")
    return _download(model, revision, patterns)


def _checked_folder(path: Path, revision: str | None, patterns: list[str]) -> Path:
    if revision is not None:
        raise UsageError(f"{path}: a local folder has no revision '{revision}'; remove the revision")
    if not (path / "config.json").is_file():
        raise UsageError(f"{path}: config.json is missing; {what_to_give(path)}")
    if patterns is not CONFIG_FILES and not any(path.glob("*.safetensors")):
        raise UsageError(f"{path}: *.safetensors are missing; give a folder with config.json and *.safetensors")
    return path


def what_to_give(folder: Path) -> str:
    """In place of a folder that is no model's."""
    if (folder / "model" / "config.json").is_file():  # of a run with method full
        return f"give {folder / 'model'}"
    is_run = (folder / "run.yaml").is_file()
    if is_run and not (folder / "adapter").is_dir():
        return f"it is a run's folder without a result: {command('train', '--resume', folder)}"
    kind = "a run's" if is_run else "an adapter's" if is_adapter(folder) else None
    if kind:
        merged = command("merge", folder, "--output", "models/merged")
        return f"it is {kind} folder: merge it first, {merged}, and give models/merged"
    return "give a folder with config.json and *.safetensors"


def _looks_like_hub_id(model: str) -> bool:
    """ORGANISATION/NAME in the Hub's letters; a name alone is more likely a mistyped path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return model.count("/") == 1 and not model.startswith(".")


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot folder in the Hub's cache. huggingface_hub shows its own progress bars."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=NEVER))
    except Exception as error:
        raise _explained(error, model, revision) from None
    if not (folder / "config.json").is_file():
        raise UsageError(f"{model}: has no config.json; give a model in Hugging Face format")
    if patterns is not CONFIG_FILES and not any(folder.glob("*.safetensors")):
        raise UsageError(f"{model}: has no *.safetensors; give a model whose weights are stored as safetensors")
    return folder


def _explained(error: Exception, model: str, revision: str | None) -> FituneError:
    """What to do about an error of `snapshot_download`, in one line."""
    from huggingface_hub import errors

    url = f"https://huggingface.co/{model}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return UsageError(f"{model}: no access; accept the licence at {url} and run `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{model}: no revision '{revision}'; see {url}/commits/main")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(f"{model}: no such folder, nor found at {url}; check the name, or run `hf auth login`")
    if status in (401, 403):
        return UsageError(f"{model}: the Hub refused the login (HTTP {status}); run `hf auth login` with a valid token")
    if isinstance(error, errors.LocalEntryNotFoundError):
        at = f" at revision '{revision}'" if revision else ""
        return UsageError(
            f"{model}: no such folder, not wholly in the Hub's cache{at}, and the Hub is out of reach; "
            f"check the network and HF_HUB_OFFLINE, or give a local folder"
        )
    reason = (str(error).strip().splitlines() or [""])[0]
    return FituneError(f"{model}: download failed: {type(error).__name__}: {reason}; the same command continues it")
