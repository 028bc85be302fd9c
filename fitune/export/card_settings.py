"""What a model card says of how the model was trained, and of how it must be asked."""

import re
from pathlib import Path

from fitune.config.json_file import json_or_nothing
from fitune.config.recipe import Recipe
from fitune.config.schema import Run
from fitune.export.chat_record import CHAT_RECORD
from fitune.export.tokenizer_files import template_of

OF_TRACKERS = re.compile(r"project|run_name|trackio_.*")
"Fields of `training:` that name projects and accounts, and change nothing in the model."


def settings_section(run: Run) -> str:
    """A table of the recipe's settings, and of every field of `training:` that it sets."""
    recipe = run.recipe
    rows = {"max_length": recipe.max_length, "packing": recipe.packing, "train_on": recipe.data.train_on}
    rows |= {"global batch": recipe.global_batch_size}
    rows |= {name: value for name, value in recipe.training.items() if not OF_TRACKERS.fullmatch(name)}
    if recipe.early_stopping:
        rows |= {f"early_stopping.{name}": value for name, value in recipe.early_stopping}
    rows |= {"seed": recipe.seed, **_lora(recipe)}
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["## Settings", "", "| setting | value |", "|---|---|", *lines])


def template_section(folder: Path) -> str:
    """The chat template in the folder; "" without one."""
    text = template_of(folder)
    return f"## Chat template\n\n{_fenced(text, 'jinja')}" if text else ""


def system_message_section(folder: Path, run: Run | None) -> str:
    """The message that the folder's record holds, of an older folder the run's; "" without one."""
    of_run = run.recipe.data.system_message if run else None
    message = json_or_nothing(folder / CHAT_RECORD).get("system_message", of_run)
    if not message:
        return ""
    how = "It was trained with this message first in every conversation that had none of its own: ask it in that way."
    return f"## System message\n\n{how}\n\n{_fenced(message, 'text')}"


def _lora(recipe: Recipe) -> dict:
    if not recipe.lora:
        return {}
    rows = {f"LoRA {name}": getattr(recipe.lora, name) for name in ("r", "alpha", "dropout", "target_modules")}
    tokens = recipe.lora.trainable_tokens
    return rows | ({"trained tokens": [f"`{token}`" for token in tokens]} if tokens else {})


def _cell(value) -> str:
    """In a table of Markdown."""
    if isinstance(value, dict):
        value = [f"{name}={inner}" for name, inner in value.items()]
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _fenced(text: str, language: str) -> str:
    """As a block of code, whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
