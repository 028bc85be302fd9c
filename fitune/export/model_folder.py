"""The small files of a merged model's folder: config, tokenizer, chat template, generation config, licence."""

import json
from pathlib import Path

import torch

from fitune.weights.model_files import LICENCE_FILES, TOKENIZER_FILES, copy_file, matching, read_json


def write_small_files(base: Path, adapter: Path, output: Path, config: dict, dtype: torch.dtype) -> None:
    """config.json, tokenizer, chat template, generation_config.json and licence: the adapter's where it has them."""
    has_tokenizer = (adapter / "tokenizer.json").exists() or (adapter / "tokenizer_config.json").exists()
    for file in matching(base, LICENCE_FILES) + matching(adapter if has_tokenizer else base, TOKENIZER_FILES):
        copy_file(file, output)
    tokenizer_config = _read_json_if_there(output / "tokenizer_config.json")
    templates = [adapter / "chat_template.jinja"]
    if "chat_template" not in tokenizer_config:
        templates.append(base / "chat_template.jinja")
    template = next((file for file in templates if file.exists()), None)
    if template:
        copy_file(template, output)
    name = str(dtype).removeprefix("torch.")
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "_name_or_path")}
    config |= {"dtype": name, "use_cache": True} | ({"torch_dtype": name} if "torch_dtype" in config else {})
    _write_json(output / "config.json", config)
    generation = _read_json_if_there(adapter / "generation_config.json")
    generation = generation or _read_json_if_there(base / "generation_config.json")
    generation["eos_token_id"] = _stop_tokens(output, config, generation, tokenizer_config)
    _write_json(output / "generation_config.json", generation)


def _stop_tokens(output: Path, config: dict, generation: dict, tokenizer_config: dict) -> list[int]:
    """Ids that end an answer: the generation config's, else config.json's, and the chat template's end of turn."""
    stop = generation.get("eos_token_id", config.get("eos_token_id"))
    stop = list(stop) if isinstance(stop, list) else [stop] if stop is not None else []
    template = output / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.exists() else str(tokenizer_config.get("chat_template"))
    added = _read_json_if_there(output / "tokenizer.json").get("added_tokens", [])
    end_of_turn = [token["id"] for token in added if token["content"] == "<|eot_id|>" and token["content"] in text]
    return list(dict.fromkeys(stop + end_of_turn))


def _read_json_if_there(file: Path) -> dict:
    return read_json(file, "remove it or write it again") if file.exists() else {}


def _write_json(file: Path, data: dict) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
