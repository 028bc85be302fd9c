"""How a model was trained to be asked: `fitune_chat.json`, beside an adapter and in the folders of whole models."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fitune.errors import UsageError

CHAT_RECORD = "fitune_chat.json"


@dataclass(frozen=True)
class ChatRecord:
    """The two things that stand around every question, as they were while the model was trained."""

    template_sha256: str
    "Of the training template, with its marks."
    system_message: str | None
    "Put first in conversations that have no system message."


def write_chat_record(folder: Path, record: ChatRecord) -> None:
    text = json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n"
    (folder / CHAT_RECORD).write_text(text, encoding="utf-8")


def read_chat_record(folder: Path) -> ChatRecord | None:
    """None where there is none: not trained by fitune, or by an earlier version. Raises UsageError if it is damaged."""
    file = folder / CHAT_RECORD
    try:
        return ChatRecord(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{file}: not a readable record of template and system message: {error}") from None
