"""JSON files of a model's, an adapter's or a run's folder."""

import json
from pathlib import Path

from fitune.errors import UsageError


def read_json(file: Path, hint: str) -> dict:
    """The object in a file. Raises UsageError, with `hint` to say what to do."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file; {hint}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{file}: holds a {type(data).__name__}, not an object; {hint}")
    return data


def json_or_nothing(file: Path) -> dict:
    """The object in a file; {} without the file, and for one that holds no object."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_json(file: Path, data: dict) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
