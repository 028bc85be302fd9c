"""What a base model's small files say about whether it can be trained, before anything is loaded."""

import json
from pathlib import Path

from fitune.errors import UsageError

ARCHITECTURE = "llama"
"The `model_type` in config.json that fitune shards and streams."


def check_base_model(folder: Path) -> None:
    """Raises UsageError for another architecture, for weights quantised otherwise than in bitsandbytes' 4 bits, and
    for a tokenizer with more tokens than the model has rows."""
    config = _read(folder / "config.json") or {}
    where, kind = folder / "config.json", config.get("model_type")
    if kind != ARCHITECTURE:
        raise UsageError(f"{where}: a {kind} model; fitune trains Llama models only (model_type: {ARCHITECTURE})")
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        if method != "bitsandbytes" or not quantised.get("load_in_4bit"):
            raise UsageError(
                f"{where}: its weights are quantised by {method}; fitune trains bf16, fp16, fp32 and bitsandbytes' "
                f"4 bits: give the model that it was made from, and method qlora quantises that one"
            )
    check_vocabulary(folder)


def check_vocabulary(folder: Path) -> None:
    """Raises UsageError if a token's id is beyond the rows of the embedding. Fewer tokens than rows are usual.

    A folder without a config.json or a tokenizer.json says nothing about it.
    """
    config, tokenizer = _read(folder / "config.json"), _read(folder / "tokenizer.json")
    rows = (config or {}).get("vocab_size")
    if rows is None or tokenizer is None:
        return
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    beyond = sorted((number, token) for token, number in ids.items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise UsageError(
            f"{folder / 'tokenizer.json'}: token {token!r} has id {number}{more}, but the model has rows for ids below "
            f"{rows} (vocab_size in config.json); give the tokenizer that belongs to the model, or resize its embedding"
        )


def _read(file: Path) -> dict | None:
    """None where there is no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file}: holds a {type(content).__name__}, not an object")
    return content
