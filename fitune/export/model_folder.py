"""The small files of a merged model's folder: config, tokenizer, chat template, generation config, licence."""

from pathlib import Path

import torch

from fitune.config.json_file import read_json, write_json
from fitune.export.chat_record import CHAT_RECORD
from fitune.export.configs import GENERATION_CONFIG, config_for_loaders, generation_config
from fitune.export.tokenizer_files import copy_tokenizer, template_of
from fitune.weights.model_files import LICENCE_FILES, copy_file, matching


def write_small_files(base: Path, adapter: Path, output: Path, config: dict, dtype: torch.dtype) -> None:
    """config.json, tokenizer, chat template, generation_config.json and licence: the adapter's where it has them."""
    for file in (*matching(base, LICENCE_FILES), *matching(adapter, [CHAT_RECORD])):
        copy_file(file, output)
    has_tokenizer = (adapter / "tokenizer.json").exists() or (adapter / "tokenizer_config.json").exists()
    copy_tokenizer(adapter if has_tokenizer else base, output, template=template_of(adapter))
    write_json(output / "config.json", config_for_loaders(config, str(dtype).removeprefix("torch.")))
    stop_ids, default = _end_of_turn(output), config.get("eos_token_id")
    generation = generation_config(base, adapter, stop_ids=stop_ids, default_stop=default)
    write_json(output / GENERATION_CONFIG, generation)


def _end_of_turn(folder: Path) -> list[int]:
    """The id of `<|eot_id|>` where the chat template writes it."""
    text, file = template_of(folder) or "", folder / "tokenizer.json"
    added = read_json(file, "write it again").get("added_tokens", []) if file.exists() else []
    return [token["id"] for token in added if token["content"] == "<|eot_id|>" and token["content"] in text]
