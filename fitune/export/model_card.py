"""README.md of what is handed over: base, data, settings, measured losses, template, licence, as the Hub reads it."""

import shlex
from pathlib import Path

import yaml

from fitune import __version__
from fitune.config.adapter_folder import ADAPTER_WEIGHTS
from fitune.config.json_file import json_or_nothing
from fitune.config.schema import Run
from fitune.export.adapter import AdapterFile
from fitune.export.adapter_servers import (
    SGLANG,
    VLLM,
    ServedBase,
    is_beside_other_weights,
    sglang_command,
    vllm_command,
    what_lacks,
)
from fitune.export.card_data import data_section, datasets_of_the_hub
from fitune.export.card_losses import losses_section
from fitune.export.card_settings import settings_section, system_message_section, template_section
from fitune.export.configs import is_misread_by_older
from fitune.weights.model_files import LICENCE_FILES, matching

CARD = "README.md"
LICENCES = {
    "META LLAMA 3 COMMUNITY LICENSE": "llama3",
    "LLAMA 3.1 COMMUNITY LICENSE": "llama3.1",
    "LLAMA 3.2 COMMUNITY LICENSE": "llama3.2",
    "LLAMA 3.3 COMMUNITY LICENSE": "llama3.3",
    "Apache License": "apache-2.0",
    "MIT License": "mit",
}
"How a licence's file begins, and what the Hub calls it."
OLDER_LOADERS = (
    "The base's config.json is in the form of transformers 5. transformers 4.x does not find its `rope_theta` there "
    "and answers otherwise with base and adapter, without a word: take transformers 5, or the merged model."
)


def write_model_card(
    folder: Path, run: Run | None, base: str, revision: str | None, base_folder: Path, *, onto: str | None = None
) -> None:
    """Into `folder`, an adapter's or a model's, which holds its template already.

    `run` is None for an adapter from elsewhere; `base` a Hub id or a local folder, of which only the name is told;
    `base_folder` where its licence lies; `onto` which of its weights an adapter was added to, if one was.
    """
    is_adapter = (folder / "adapter_config.json").exists()
    licence = _licence(base_folder)
    sections = [
        _front_matter(run, base, licence, is_adapter),
        f"# {_title(run, base, is_adapter)}",
        _base(base, revision, run, licence),
        _merged(onto, run),
        OLDER_LOADERS if is_adapter and is_misread_by_older(json_or_nothing(base_folder / "config.json")) else "",
        *((data_section(run), settings_section(run), losses_section(run)) if run else ()),
        system_message_section(folder, run),
        template_section(folder),
        _serving(folder, ServedBase(_name(base), revision), base_folder) if is_adapter else "",
        f"Made with fitune {__version__}.",
    ]
    (folder / CARD).write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def _name(base: str) -> str:
    """A folder's name stands for its path, which is nobody's business."""
    return Path(base).name if Path(base).is_absolute() or Path(base).is_dir() else base


def _title(run: Run | None, base: str, is_adapter: bool) -> str:
    kind = "LoRA adapter" if is_adapter else "model"
    return f"{run.folder.name}: {kind}" if run else f"{kind} of {_name(base)}"


def _front_matter(run: Run | None, base: str, licence: str, is_adapter: bool) -> str:
    fields = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fitune", *([run.recipe.method] if run else []), *(["lora"] if is_adapter else [])],
        "license": licence,
    }
    if _name(base) == base:
        fields["base_model"] = base
        fields["base_model_relation"] = "adapter" if is_adapter else "finetune"
    if run and (from_hub := datasets_of_the_hub(run)):
        fields["datasets"] = from_hub
    fields["tags"] = list(dict.fromkeys(fields["tags"]))
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _base(base: str, revision: str | None, run: Run | None, licence: str) -> str:
    at = f" at `{revision}`" if revision else ""
    method = f" Method: {run.recipe.method}." if run else ""
    terms = f"The base's licence ({licence}) holds for this model too; see its file beside this one where there is one."
    built = " Built with Meta Llama 3." if licence.startswith("llama3") else ""
    return f"Base: `{_name(base)}`{at}.{method} {terms}{built}"


def _merged(onto: str | None, run: Run | None) -> str:
    """Which numbers are of this model."""
    if onto == "trained":
        return "Merged: the base's layers went through NF4 and back, as in training; then the adapter was added."
    if onto == "original" and run and run.recipe.method == "qlora":
        return (
            "Merged: the adapter was added to the base's own weights. It was trained and measured beside weights in "
            "NF4, so that no loss here is of this model."
        )
    return "Merged: the adapter was added to the base's weights as they are stored." if onto else ""


def _licence(folder: Path) -> str:
    texts = [file.read_text(encoding="utf-8", errors="replace")[:2000] for file in matching(folder, LICENCE_FILES)]
    return next((name for text in texts for begin, name in LICENCES.items() if begin in text), "other")


def _serving(folder: Path, base: ServedBase, base_folder: Path) -> str:
    """How vLLM and SGLang add an adapter to its base, each where it takes this one."""
    if not (folder / ADAPTER_WEIGHTS).exists():
        return ""
    commands, refused = [], []
    with AdapterFile(folder) as file:
        for server in (VLLM, SGLANG):
            if takes := what_lacks(server, file):
                refused.append(f"{server} takes {takes}: for {server} merge it (`fitune merge`).")
            elif server == VLLM:
                commands.append(vllm_command("ADAPTER", file.config, base))
            else:
                commands.append(sglang_command("ADAPTER", base))
    lines = "\n".join(map(shlex.join, commands))
    parts = [f"ADAPTER is this folder.\n\n```\n{lines}\n```" if commands else "", *refused]
    if commands and is_beside_other_weights(folder, json_or_nothing(base_folder / "config.json")):
        parts.append("It was trained and measured beside weights in NF4; here it is added to the base's own weights.")
    return "\n\n".join(["## Serving", *filter(None, parts)])
