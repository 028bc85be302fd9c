"""data.json: the rows that a run was started with, by SHA-256, and the report of `prepare` about them.

A prepared folder may be written again with other rows. The run's page, its model card and `eval` go by this file.
"""

import hashlib
import json
from pathlib import Path

from fitune.config import run as runs
from fitune.config.json_file import json_or_nothing
from fitune.output_folder import write_whole

TRAINED_ON = "data.json"


def keep_trained_rows(folder: Path, train: str) -> None:
    """Writes data.json into a run's folder, from the prepared folder that its run.yaml names. Call when it starts.

    `train` is the SHA-256 of the train.jsonl that is trained. What an earlier start kept of the same rows stays.
    A report of other rows, as of a train.jsonl that was changed by hand, is not kept.
    """
    if _kept_rows(folder).get("train") == train:
        return
    prepared = Path(runs.load(folder).recipe.data.prepared)
    report = json_or_nothing(prepared / "report.json")
    content = {
        "rows": {"train": train, "test": _sha256(prepared / "test.jsonl")},
        "report": report if train_hash(report) == train else None,
    }
    write_whole(folder / TRAINED_ON, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def rows_at_the_start(folder: Path) -> dict[str, str | None]:
    """SHA-256 of a run's rows by split, `train` and `test`; of an older run `train` alone, or nothing."""
    identity = json_or_nothing(folder / "origin.json").get("identity")
    known = {"train": identity.get("data")} if isinstance(identity, dict) else {}
    return _kept_rows(folder) or known


def train_hash(report: dict) -> str | None:
    """SHA-256 of train.jsonl as a report of `prepare` says; None where it does not."""
    files = report.get("files")
    file = files.get("train.jsonl") if isinstance(files, dict) else None
    return file.get("sha256") if isinstance(file, dict) else None


def _kept_rows(folder: Path) -> dict[str, str | None]:
    rows = json_or_nothing(folder / TRAINED_ON).get("rows")
    return rows if isinstance(rows, dict) else {}


def _sha256(file: Path) -> str | None:
    """None without the file: a run needs no held-out rows."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
