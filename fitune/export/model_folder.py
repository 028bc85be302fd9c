"""The small files of a merged model's folder: config, tokenizer, chat template, generation config, licence."""

from pathlib import Path

import torch

from fitune.config.json_file import read_json, write_json
from fitune.export.chat_record import CHAT_RECORD
from fitune.export.configs import GENERATION_CONFIG, config_for_loaders, generation_config
from fitune.export.tokenizer_files import copy_tokenizer, has_tokenizer, template_of
from fitune.weights.model_files import LICENCE_FILES, copy_file, matching


def write_small_files(base: Path, adapter: Path, output: Path, config: dict, dtype: torch.dtype) -> None:
    """config.json, tokenizer, chat template, generation_config.json and licence: the adapter's where it has them."""
    for file in (*matching(base, LICENCE_FILES), *matching(adapter, [CHAT_RECORD])):
        copy_file(file, output)
    copy_tokenizer(adapter if has_tokenizer(adapter) else base, output, template=template_of(adapter))
    write_json(output / "config.json", config_for_loaders(config, str(dtype).removeprefix("torch.")))
    write_json(output / GENERATION_CONFIG, generation_of_adapter(base, adapter, output))


def generation_of_adapter(base: Path, adapter: Path, texts: Path) -> dict:
    """The generation_config.json of base and adapter together; `texts` has their tokenizer and chat template."""
    default = read_json(base / "config.json", "give a folder with config.json").get("eos_token_id")
    return generation_config(base, adapter, stop_ids=_end_of_turn(texts), default_stop=default)


def _end_of_turn(folder: Path) -> list[int]:
    """The id of `<|eot_id|>` where the chat template writes it."""
    text, file = template_of(folder) or "", folder / "tokenizer.json"
    added = read_json(file, "write it again").get("added_tokens", []) if file.exists() else []
    return [token["id"] for token in added if token["content"] == "<|eot_id|>" and token["content"] in text]
