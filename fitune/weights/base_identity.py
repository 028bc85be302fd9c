"""Which base an adapter belongs to: `fitune_base.json` in its folder, and the comparison with a base at hand."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fitune.config.adapter_folder import BASE_RECORD
from fitune.config.hub import resolved_commit
from fitune.config.recipe import Base
from fitune.errors import UsageError
from fitune.weights.base_weights import unpacked_shapes
from fitune.weights.safetensors_files import Checkpoint

SAMPLE_BYTES = 1024
"Read at the start, middle and end of every tensor: about 2 MB of a 70B model."


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter remembers of its base."""

    model: str
    revision: str | None
    "The Hub's commit where it is known."
    fingerprint: dict[str, str]
    "Of `base_fingerprint`."
    computed_in: str | None = None
    "`nf4` if the adapter was trained on the base's weights through NF4, `stored` if as they are; None: not known."


def identify_base(base: Base, folder: Path) -> BaseRecord:
    """The record of the recipe's `base`, which lies in `folder`."""
    with Checkpoint(folder) as checkpoint:
        return BaseRecord(base.model, resolved_commit(folder) or base.revision, base_fingerprint(checkpoint))


def base_fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
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


def write_base_record(adapter: Path, record: BaseRecord) -> None:
    """Leaves the record in the adapter's folder."""
    (adapter / BASE_RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")


def read_base_record(adapter: Path) -> BaseRecord | None:
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
    return BaseRecord(record["model"], record["revision"], record["fingerprint"], record.get("computed_in"))


def base_mismatch(record: BaseRecord, fingerprint: dict[str, str]) -> str | None:
    """Why a base with `fingerprint` is not, or may not be, the recorded one; None if it is.

    The same model in another precision (NF4 instead of bf16) has other bytes: whether it is the same cannot be known.
    """
    if record.fingerprint == fingerprint:
        return None
    name = record.model + (f" at {record.revision}" if record.revision else "")
    if record.fingerprint.get("shapes") != fingerprint["shapes"]:
        return f"has other tensors or shapes than the adapter's base {name}"
    if record.fingerprint.get("tensors") != fingerprint["tensors"]:
        return f"is stored in another precision than the adapter's base {name}: its weights cannot be compared"
    return f"has the shapes but not the weights of the adapter's base {name}"


def settle_doubt(base: Path, adapter: Path, doubt: str | None, *, recorded: bool, force: bool) -> str | None:
    """What to tell the user before `adapter` is used on `base`, if anything. Raises UsageError for a doubt not forced.

    `recorded`: whether the adapter has a record of its base, so that no doubt means that there is none.
    """
    if doubt and not force:
        raise UsageError(f"{base}: {doubt}; give the adapter's own base, or --force if you know that they fit")
    if doubt:
        return f"warning: {base}: {doubt}; going on all the same (--force), unknown whether they fit"
    return None if recorded else f"note: {adapter}: no record of its base; only names and shapes were compared"


def _sample_places(nbytes: int) -> list[int]:
    return sorted({0, max(0, nbytes // 2 - SAMPLE_BYTES // 2), max(0, nbytes - SAMPLE_BYTES)})


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
