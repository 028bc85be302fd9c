"""Where a model lies, and which model it is.

A model is a local folder, taken as it is, or a Hugging Face Hub id, found in the Hub's cache or downloaded to it. The
login is huggingface_hub's own (HF_TOKEN, or `hf auth login`); no token passes through here. An adapter remembers its
base in `fitune_base.json`: model, revision and a fingerprint of the weights.
"""

import hashlib
import json
import math
import re
from itertools import pairwise
from pathlib import Path

from fitune.errors import FituneError, UsageError

CONFIG_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*", "USE_POLICY*", "NOTICE*"]
WEIGHT_AND_CONFIG_FILES = ["*.safetensors", *CONFIG_FILES]
NEVER = ["original/*", "*.bin", "*.pth", "*.pt", "*.ckpt"]
"Copies of the weights in other formats: twice the bytes, and pickles."

BASE_RECORD = "fitune_base.json"
SAMPLE_BYTES = 1024
"Read at the start, middle and end of every tensor: about 2 MB of a 70B model."

_COMMIT = re.compile(r"[0-9a-f]{40}")
_QUANT_STATE = re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$")
_PACKED_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


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
        raise UsageError(f"{path}: config.json is missing; give a folder with config.json and *.safetensors")
    if patterns is not CONFIG_FILES and not any(path.glob("*.safetensors")):
        raise UsageError(f"{path}: *.safetensors are missing; give a folder with config.json and *.safetensors")
    return path


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


def base_fingerprint(checkpoint) -> dict[str, str]:
    """What tells one base from another, cheap at any size: SHA-256 digests of an open `Checkpoint`.

    `shapes` covers names and shapes, NF4 weights unpacked, so it is the same for every precision of an architecture;
    `tensors` covers names, dtypes and shapes as stored; `sample` covers bytes at fixed places of every stored tensor.
    """
    stored = sorted(checkpoint.tensors.values(), key=lambda info: info.name)
    sample = hashlib.sha256()
    for info in stored:
        sample.update(f"{info.name}:".encode())
        for start in _sample_places(info.nbytes):
            stop = min(start + SAMPLE_BYTES, info.nbytes)
            sample.update(checkpoint.read_bytes(info.name, start, stop).numpy())
    return {
        "shapes": _digest(sorted(unpacked_shapes(checkpoint).items())),
        "tensors": _digest([(info.name, str(info.dtype), info.shape) for info in stored]),
        "sample": sample.hexdigest(),
    }


def unpacked_shapes(checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight, in the file's order; a bitsandbytes 4-bit weight by its shape before packing.

    Raises FituneError where a packed weight's description is broken or its parts are missing.
    """
    described = {name: name[: match.start()] for name in checkpoint.tensors if (match := _QUANT_STATE.search(name))}
    shapes = {}
    for state_name, name in described.items():
        try:
            state = json.loads(checkpoint.read(state_name).numpy().tobytes())
            shapes[name] = tuple(int(size) for size in state["shape"])
            parts = ["absmax", "quant_map"] + ["nested_absmax", "nested_quant_map"] * ("nested_blocksize" in state)
        except (ValueError, KeyError, TypeError) as error:
            raise FituneError(f"{checkpoint[state_name].file}: tensor {state_name}: broken: {error!r}") from None
        for part in parts:
            checkpoint[f"{name}.{part}"]
        if (math.prod(shapes[name]) + 1) // 2 != checkpoint[name].nbytes:
            info = checkpoint[name]
            raise FituneError(f"{info.file}: tensor {name}: {info.nbytes} bytes cannot hold {shapes[name]} in 4 bits")
    companions = {f"{name}.{part}" for name in shapes for part in _PACKED_PARTS} | set(described)
    return {n: shapes.get(n, info.shape) for n, info in checkpoint.tensors.items() if n not in companions}


def write_base_record(adapter: Path, model: str, revision: str | None, fingerprint: dict[str, str]) -> None:
    """Notes in an adapter's folder which base it belongs to; `revision` is best the resolved commit."""
    record = {"model": model, "revision": revision, "fingerprint": fingerprint}
    (adapter / BASE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_base_record(adapter: Path) -> dict | None:
    """The note of `write_base_record`; None if the adapter has none (it was not trained by fitune)."""
    file = adapter / BASE_RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not {"model", "revision", "fingerprint"} <= set(record) or not isinstance(record["fingerprint"], dict):
            raise ValueError("needs model, revision and fingerprint")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{file}: not a readable record of the base: {error}") from None
    return record


def base_mismatch(record: dict, fingerprint: dict[str, str]) -> str | None:
    """Why a base with `fingerprint` is not, or may not be, the recorded one; None if it is.

    The same model in another precision (NF4 instead of bf16) has other bytes: whether it is the same cannot be known.
    """
    recorded = record["fingerprint"]
    if recorded == fingerprint:
        return None
    name = record["model"] + (f" at {record['revision']}" if record["revision"] else "")
    if recorded.get("shapes") != fingerprint["shapes"]:
        return f"has other tensors or shapes than the adapter's base {name}"
    if recorded.get("tensors") != fingerprint["tensors"]:
        return f"is stored in another precision than the adapter's base {name}: its weights cannot be compared"
    return f"has the shapes but not the weights of the adapter's base {name}"


def _sample_places(nbytes: int) -> list[int]:
    return sorted({0, max(0, nbytes // 2 - SAMPLE_BYTES // 2), max(0, nbytes - SAMPLE_BYTES)})


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
