"""Which values config.json may hold: wrong ones are refused by their keys, before anything computes with them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fitune.errors import UsageError


@dataclass(frozen=True)
class Kind:
    said: str
    holds: Callable[[object], bool]

    def or_null(self) -> "Kind":
        return Kind(f"{self.said}, or null", lambda value: value is None or self.holds(value))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_whole(value: object) -> bool:
    return type(value) is int and value >= 0


COUNT, NUMBER = Kind("a whole number above 0", _is_count), Kind("a number above 0", _is_number)
WHOLE = Kind("a whole number", _is_whole)
PAIRS = Kind("an even whole number above 0", lambda value: _is_count(value) and value % 2 == 0)
"RoPE turns the numbers of a head in pairs."
SWITCH = Kind("true or false", lambda value: type(value) is bool)
TEXT, OBJECT = Kind("a text", lambda value: type(value) is str), Kind("an object", lambda value: type(value) is dict)
TEXTS = Kind("a list of texts", lambda value: type(value) is list and all(type(each) is str for each in value))
TOKENS = Kind(
    "a token's id, or a list of them",
    lambda value: all(map(_is_whole, value)) if type(value) is list else _is_whole(value),
)

KINDS = {
    "hidden_act": TEXT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT.or_null(),
    "head_dim": PAIRS.or_null(),
    "vocab_size": COUNT,
    "max_position_embeddings": COUNT,
    "sliding_window": COUNT.or_null(),
    "max_window_layers": WHOLE.or_null(),
    "layer_types": TEXTS.or_null(),
    "rms_norm_eps": NUMBER,
    "rope_theta": NUMBER.or_null(),
    "rope_parameters": OBJECT.or_null(),
    "rope_scaling": OBJECT.or_null(),
    "tie_word_embeddings": SWITCH,
    "attention_bias": SWITCH.or_null(),
    "mlp_bias": SWITCH.or_null(),
    "use_sliding_window": SWITCH.or_null(),
    "bos_token_id": TOKENS.or_null(),
    "eos_token_id": TOKENS.or_null(),
    "pad_token_id": TOKENS.or_null(),
    "dtype": TEXT.or_null(),
    "torch_dtype": TEXT.or_null(),
    "quantization_config": OBJECT.or_null(),
}
"Of the keys that fitune, or transformers for it, reads of a model that it trains."
NO_NULL = {
    "llama": {"attention_bias": SWITCH, "mlp_bias": SWITCH},
    "mistral": {"num_key_value_heads": COUNT},
    "qwen2": {"head_dim": PAIRS, "max_window_layers": WHOLE, "use_sliding_window": SWITCH},
    "qwen3": {"head_dim": PAIRS, "max_window_layers": WHOLE, "use_sliding_window": SWITCH, "attention_bias": SWITCH},
}
"By model_type, the keys where transformers takes no null, which it takes of other types."
SHAPES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"Without one of these, transformers takes the size of another model."
ROPE = dict.fromkeys(
    ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), NUMBER
)
"Of the keys in the blocks about it."
ROPE_BLOCKS = ("rope_parameters", "rope_scaling")
KEY_VALUE_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
"What transformers takes where config.json does not say; Llamas have as many as query heads."
HEAD_DIM = {"qwen3": 128}
"Likewise; others share hidden_size among the heads."
CORRECT_IT = "; correct it, or get the model again"


@dataclass(frozen=True)
class Heads:
    """Of a decoder layer's attention."""

    query: int
    key_value: int
    dim: int


def model_type(config: Mapping, where: Path) -> str | None:
    """As transformers takes it, None where there is none. Raises UsageError for one that is no text.

    To transformers a mistral with layer_types is a ministral.
    """
    _check(config, {"model_type": TEXT.or_null()}, "", where)
    kind = config.get("model_type")
    return "ministral" if kind == "mistral" and "layer_types" in config else kind


def check_types(config: Mapping, where: Path) -> None:
    """Raises UsageError for the first value of a wrong kind, and for heads that do not divide what they share.

    `where` is the config.json that it stands in, of a model that fitune trains.
    """
    _check(config, KINDS | NO_NULL[config["model_type"]], "", where)
    blocks = {block: config.get(block) or {} for block in ROPE_BLOCKS}
    for block, values in blocks.items():
        _check(values, ROPE, f"{block}.", where)
    if not any("rope_theta" in values for values in blocks.values()):
        _check(config, {"rope_theta": NUMBER}, "", where)
    if {"hidden_size", "num_attention_heads"} <= config.keys():
        _check_heads(config, where)


def heads_of(config: Mapping) -> Heads:
    """Those of a config.json with the sizes that `_check_heads` needs, with transformers' defaults."""
    kind, heads = config["model_type"], config["num_attention_heads"]
    key_value = config.get("num_key_value_heads", KEY_VALUE_HEADS.get(kind)) or heads
    return Heads(heads, key_value, config.get("head_dim") or HEAD_DIM.get(kind) or config["hidden_size"] // heads)


def _check_heads(config: Mapping, where: Path) -> None:
    heads, hidden = heads_of(config), config["hidden_size"]
    if heads.query % heads.key_value:
        not_given = "" if config.get("num_key_value_heads") else " where it is not given"
        raise UsageError(
            f"{where}: num_attention_heads is {heads.query}, expected a multiple of num_key_value_heads "
            f"({heads.key_value}{not_given}){CORRECT_IT}"
        )
    is_shared = config["model_type"] == "llama" or not (config.get("head_dim") or config["model_type"] in HEAD_DIM)
    if is_shared and hidden % heads.query:  # transformers refuses a Llama so even with a head_dim
        raise UsageError(
            f"{where}: hidden_size is {hidden}, expected a multiple of num_attention_heads ({heads.query}){CORRECT_IT}"
        )
    if heads.dim % 2:
        raise UsageError(
            f"{where}: hidden_size {hidden} gives each of num_attention_heads {heads.query} {heads.dim} numbers, "
            f"expected an even number{CORRECT_IT}"
        )


def check_shapes_are_there(config: Mapping, where: Path) -> None:
    if missing := next((key for key in SHAPES if key not in config), None):
        raise UsageError(f"{where}: key {missing!r} is missing")


def _check(values: Mapping, kinds: dict[str, Kind], block: str, where: Path) -> None:
    for key, kind in kinds.items():
        if key in values and not kind.holds(values[key]):
            raise UsageError(f"{where}: {block}{key} is {values[key]!r}, expected {kind.said}{CORRECT_IT}")
