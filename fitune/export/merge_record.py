"""What a merged folder says of its origin: `fitune_merge.json`."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch

from fitune import __version__
from fitune.config.adapter_folder import ADAPTER_WEIGHTS
from fitune.errors import UsageError
from fitune.export.check import Comparison
from fitune.weights.base_identity import BaseRecord

MERGE_RECORD = "fitune_merge.json"


@dataclass(frozen=True)
class MergeRecord:
    """Base, adapter, and which of the base's weights the adapter was added to."""

    fitune: str
    base: str
    base_revision: str | None
    base_fingerprint: dict[str, str]
    adapter_sha256: str
    "Of adapter_model.safetensors."
    onto: str
    "`trained`: the base through NF4, as QLoRA computed with it; `original`: the base as it is stored."
    dtype: str
    check: dict | None
    "What `check` measured; None where it was left out."

    @classmethod
    def of_adapter(
        cls, base: BaseRecord, adapter: Path, onto: str, dtype: torch.dtype, compared: Comparison | None
    ) -> Self:
        with (adapter / ADAPTER_WEIGHTS).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        measured = compared.as_dict() if compared else None
        name = str(dtype).removeprefix("torch.")
        return cls(__version__, base.model, base.revision, base.fingerprint, digest, onto, name, measured)


def write_merge_record(folder: Path, record: MergeRecord) -> None:
    (folder / MERGE_RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")


def read_merge_record(folder: Path) -> MergeRecord | None:
    """None where there is none: not merged by fitune, or by an earlier version."""
    file = folder / MERGE_RECORD
    try:
        return MergeRecord(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{file}: not a readable record of a merge: {error}") from None
