"""The tokenizer's files of what is written: the base's, with the chat template that was trained."""

import re
from pathlib import Path

from fitune.config.json_file import read_json, write_json
from fitune.data.chat_template import as_one
from fitune.weights.model_files import TEMPLATES_BY_NAME, TOKENIZER_FILES, copy_file, copy_templates_by_name, matching

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
NAME_SINCE_5 = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"What transformers 5 calls the class; both versions know the older name."
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
INPUTS = ["input_ids", "attention_mask"]
HOW_IT_WAS_LOADED = ("backend", "is_local", "local_files_only", "name_or_path")
"Keys that transformers 5 adds, and that say nothing about the tokenizer."


def has_tokenizer(folder: Path) -> bool:
    """Whether its vocabulary is there: PEFT alone saves none, and of tokenizer_config.json alone comes an empty one."""
    return any((folder / name).exists() for name in VOCABULARIES)


def copy_tokenizer(source: Path, folder: Path, *, template: str | None = None, pad_token: str | None = None) -> None:
    """The tokenizer of `source`, as transformers 4.x and 5.x both read it.

    `template`, if given, takes the place of its chat template; marks for training are taken out of either.
    """
    for file in matching(source, TOKENIZER_FILES):
        copy_file(file, folder)
    if template is None:
        copy_templates_by_name(source, folder)
    if not (folder / CONFIG).exists():
        return
    config = read_json(folder / CONFIG, "write it again")
    own = config.pop("chat_template", None)
    if (source / TEMPLATE).exists():
        own = (source / TEMPLATE).read_text(encoding="utf-8")
    if template is None and not isinstance(own, str) and own is not None:
        config["chat_template"] = own  # several templates by name
    elif text := template or own:
        (folder / TEMPLATE).write_text(without_marks(text), encoding="utf-8")
    if pad_token:
        config["pad_token"] = pad_token
    write_json(folder / CONFIG, _for_loaders(config))


def without_marks(template: str) -> str:
    """A chat template without transformers' `generation` tags, which other Jinja readers refuse.

    An `if` that is always true stands in their place, so that whitespace is trimmed as before and every conversation
    becomes the same text.
    """
    template = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", template)


def template_of(folder: Path) -> str | None:
    """The chat template of a model's folder, as one where there are several by name."""
    own = read_json(folder / CONFIG, "").get("chat_template") if (folder / CONFIG).exists() else None
    named = {one["name"]: one["template"] for one in own} if isinstance(own, list) else {"default": own}
    if (folder / TEMPLATE).exists():
        named["default"] = (folder / TEMPLATE).read_text(encoding="utf-8")
    named |= {file.stem: file.read_text(encoding="utf-8") for file in (folder / TEMPLATES_BY_NAME).glob("*.jinja")}
    return as_one(named)


def _for_loaders(config: dict) -> dict:
    result = {key: value for key, value in config.items() if key not in HOW_IT_WAS_LOADED}
    if (name := result.get("tokenizer_class")) in NAME_SINCE_5:
        result["tokenizer_class"] = NAME_SINCE_5[name]
        result.setdefault(
            "model_input_names", INPUTS
        )  # in 4.x that class gives token_type_ids too, which Llama refuses
    if isinstance(extra := result.get("extra_special_tokens"), list):  # 4.x wants a table of names there
        del result["extra_special_tokens"]
        result.setdefault("additional_special_tokens", extra)
    return result
