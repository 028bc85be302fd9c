"""What a base model's small files say about whether it can be trained, before anything is loaded.

The one owner of what is refused about a base: `prepare`, `plan`, the checks before a start, the ranks, `quantize` and
`merge` ask here.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from fitune.config.adapted_linears import adapted_linears
from fitune.config.config_types import check_shapes_are_there, check_types, heads_of, model_type
from fitune.config.recipe import Recipe
from fitune.config.stored_weights import ADVICE, check_stored_weights
from fitune.config.tiles import NF4_BLOCK
from fitune.errors import UsageError

ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2 and Qwen2.5", "qwen3": "Qwen3 without experts"}
"The `model_type` in config.json of what fitune shards, streams and trains, and what such models are called."
ACTIVATION = "silu"
"The layer written out knows no other."


def check_base_model(folder: Path, recipe: Recipe | None = None) -> dict:
    """The contents of config.json. Raises UsageError for a base that `recipe`, or any, could not be trained on.

    Another architecture; weights quantised otherwise than in bitsandbytes' 4 bits; a head that is nowhere; a tokenizer
    with more tokens than the model has rows; an adapter on more than the layers' linears; sizes that the recipe's
    method or length does not go with.
    """
    where = folder / "config.json"
    config = _read(where) or {}
    check_config(config, where)
    check_stored_weights(folder, tied=bool(config.get("tie_word_embeddings")))
    check_vocabulary(folder)
    if recipe is not None:
        if recipe.lora is not None:
            adapted_linears(recipe.lora, config.get("num_hidden_layers", 32))  # transformers' default
        _check_method(config, where, recipe)
        if positions := config.get("max_position_embeddings"):
            refuse_length_beyond(positions, recipe, folder)
        _check_window(config, where, recipe)
        if dropout := config.get("attention_dropout"):
            raise UsageError(
                f"{where}: attention_dropout is {dropout}, with which fitune does not train; set it to 0.0"
            )
    return config


def check_config(config: Mapping, where: Path) -> None:
    """Raises UsageError for an architecture that is not Llama's, a value of a wrong kind, and weights in a format that
    is not read.

    `where` is the config.json that it stands in.
    """
    if (kind := model_type(config, where)) not in ARCHITECTURES:
        known = ", ".join(f"{name} (model_type: {each})" for each, name in ARCHITECTURES.items())
        named = f"a {kind}" if kind else "an unnamed"
        raise UsageError(f"{where}: {named} model; fitune trains these only: {known}")
    check_types(config, where)
    if (activation := config.get("hidden_act", ACTIVATION)) != ACTIVATION:
        raise UsageError(f"{where}: hidden_act is {activation!r}; fitune trains models with {ACTIVATION!r} only")
    check_precision(config, where)


def check_sizes(config: Mapping, where: Path) -> None:
    """Raises UsageError for a size that is missing or no number, and for other values of a wrong kind.

    Of the models that fitune trains: what others' config.json may hold is transformers' to say.
    """
    if model_type(config, where) in ARCHITECTURES:
        check_types(config, where)
        check_shapes_are_there(config, where)


def check_precision(config: Mapping, where: Path) -> None:
    """Raises UsageError for weights quantised otherwise than in bitsandbytes' 4 bits: fp8, gptq, awq and others."""
    quantised = config.get("quantization_config")
    if not quantised or in_four_bits(config):
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    raise UsageError(f"{where}: its weights are quantised by {method}; {ADVICE}")


def in_four_bits(config: Mapping) -> bool:
    """Whether config.json says that the weights are in bitsandbytes' 4 bits."""
    quantised = config.get("quantization_config")
    if not isinstance(quantised, dict):
        return False
    return quantised.get("quant_method") == "bitsandbytes" and bool(quantised.get("load_in_4bit"))


def refuse_length_beyond(positions: int, recipe: Recipe, model: Path | str) -> None:
    """Raises UsageError for rows that are longer than the model has `positions`."""
    if recipe.max_length > positions:
        raise UsageError(
            f"max_length {recipe.max_length} is beyond the {positions} positions of {model}; set max_length: "
            f"{positions} or less"
        )


def _check_method(config: dict, where: Path, recipe: Recipe) -> None:
    """Raises UsageError for a method that the model's weights or sizes do not go with."""
    if in_four_bits(config) and recipe.method != "qlora":
        raise UsageError(
            f"{where}: its weights are in 4 bits; method {recipe.method} needs bf16, fp16 or fp32: use method: qlora, "
            f"or give the model that it was made from"
        )
    if config.get("tie_word_embeddings") and recipe.lora and recipe.lora.trainable_tokens:
        raise UsageError(
            f"{where}: lora.trainable_tokens needs an embedding and a head of their own, here they are one tensor "
            f"(tie_word_embeddings); leave trainable_tokens out, and use chat_template: plain if the base never "
            f"learned the template's tokens"
        )
    if recipe.method == "qlora":
        for size, count in _inputs_of_linears(config).items():
            if count % NF4_BLOCK:
                raise UsageError(
                    f"{where}: {size} {count} is no multiple of {NF4_BLOCK}, which method qlora needs: its weights "
                    f"are quantised in blocks of {NF4_BLOCK}; use method: lora"
                )


def _inputs_of_linears(config: dict) -> dict[str, int]:
    """How many inputs a decoder layer's linears have, by what config.json calls it."""
    try:
        heads = heads_of(config)
        sizes = {key: config[key] for key in ("hidden_size", "intermediate_size")}
    except KeyError:  # a file that leaves sizes to transformers' defaults; loading compares them with the weights
        return {}
    return sizes | {"num_attention_heads x head_dim": heads.query * heads.dim}


def _check_window(config: dict, where: Path, recipe: Recipe) -> None:
    """Raises UsageError for rows longer than a sliding window: in training every token sees all tokens before it.

    Up to the window's length that is what the model computes.
    """
    window = _sliding_window(config)
    if window is not None and recipe.max_length > window:
        raise UsageError(
            f"{where}: max_length {recipe.max_length} is beyond the model's sliding window of {window} tokens; set "
            f"max_length: {window} or less"
        )


def _sliding_window(config: dict) -> int | None:
    """How many tokens a token of some layer sees, itself included; None where all. Defaults are transformers'."""
    kind, window = config.get("model_type"), config.get("sliding_window", 4096)
    if kind == "mistral":
        return window
    if kind not in ("qwen2", "qwen3") or not config.get("use_sliding_window"):
        return None
    layers = config.get("layer_types")
    slides = config.get("max_window_layers", 28) < config.get("num_hidden_layers", 32)
    return window if (slides if layers is None else "sliding_attention" in layers) else None


def check_vocabulary(folder: Path) -> None:
    """Raises UsageError if a token's id is beyond the rows of the embedding. Fewer tokens than rows are usual.

    A folder without a config.json, or with none of the files that are looked at, says nothing about it.
    """
    where = folder / "config.json"
    config = _read(where) or {}
    if model_type(config, where) in ARCHITECTURES:
        check_types(config, where)
    rows = config.get("vocab_size")
    if not isinstance(rows, int):
        return
    beyond = sorted((number, token) for token, number in token_ids(folder).items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise UsageError(
            f"{folder}: the tokenizer's token {token!r} has id {number}{more}, but the model has rows for ids below "
            f"{rows} (vocab_size in config.json); give the tokenizer that belongs to the model, or resize its embedding"
        )


def token_ids(folder: Path) -> dict[str, int]:
    """Token -> id, as far as the tokenizer's JSON files say; they are not loaded into a tokenizer."""
    tokenizer = _read(folder / "tokenizer.json")
    vocabulary = (tokenizer or {}).get("model", {}).get("vocab") if tokenizer else _read(folder / "vocab.json")
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of ids
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    ids = dict(vocabulary or {}) | (_read(folder / "added_tokens.json") or {})
    ids |= {token["content"]: token["id"] for token in (tokenizer or {}).get("added_tokens") or []}
    added = (_read(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder") or {}
    return ids | {token["content"]: int(number) for number, token in added.items()}


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
