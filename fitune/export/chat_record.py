"""How a model was trained to be asked: `fitune_chat.json`, beside an adapter and in the folders of whole models."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fitune.config.json_file import write_json
from fitune.config.schema import Run
from fitune.data.chat_template import template_hash
from fitune.errors import UsageError
from fitune.export.tokenizer_files import TEMPLATE

CHAT_RECORD = "fitune_chat.json"


@dataclass(frozen=True)
class ChatRecord:
    """The two things that stand around every question, as they were while the model was trained."""

    template_sha256: str
    "Of the training template, with its marks."
    system_message: str | None
    "Put first in conversations that have no system message."


def write_chat_record(folder: Path, record: ChatRecord) -> None:
    write_json(folder / CHAT_RECORD, asdict(record))


def read_chat_record(folder: Path) -> ChatRecord | None:
    """None where there is none: not trained by fitune, or by an earlier version. Raises UsageError if it is damaged."""
    file = folder / CHAT_RECORD
    try:
        return ChatRecord(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{file}: not a readable record of template and system message: {error}") from None


def refuse_another_chat(run: Run, tokenizer) -> None:
    """Raises UsageError if the run's result was trained with another chat template or system message than it has now.

    `tokenizer` holds the template that the run's recipe names.
    """
    record = read_chat_record(run.result_folder)
    if record is None:
        return
    if record.template_sha256 != template_hash(tokenizer):
        raise UsageError(
            f"{run.result_folder}: trained with another chat template than {run.recipe.data.chat_template} is now; "
            f"put the old one back: {run.result_folder / TEMPLATE} has it, without marks"
        )
    if record.system_message != (now := run.recipe.data.system_message):
        raise UsageError(
            f"{run.result_folder}: trained with data.system_message {record.system_message!r}; "
            f"{run.folder / 'run.yaml'} says {now!r}: put the old one back"
        )
