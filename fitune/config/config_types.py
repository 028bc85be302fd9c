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


def _is_token_id(value: object) -> bool:
    return type(value) is int and value >= 0


COUNT, NUMBER = Kind("a whole number above 0", _is_count), Kind("a number above 0", _is_number)
SWITCH = Kind("true or false", lambda value: type(value) is bool)
TEXT, OBJECT = Kind("a text", lambda value: type(value) is str), Kind("an object", lambda value: type(value) is dict)
TEXTS = Kind("a list of texts", lambda value: type(value) is list and all(type(each) is str for each in value))
TOKENS = Kind(
    "a token's id, or a list of them",
    lambda value: all(map(_is_token_id, value)) if type(value) is list else _is_token_id(value),
)

KINDS = {
    "hidden_act": TEXT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT.or_null(),
    "head_dim": COUNT.or_null(),
    "vocab_size": COUNT,
    "max_position_embeddings": COUNT,
    "sliding_window": COUNT.or_null(),
    "max_window_layers": Kind("a whole number", lambda value: type(value) is int and value >= 0).or_null(),
    "layer_types": TEXTS.or_null(),
    "rms_norm_eps": NUMBER,
    "rope_theta": NUMBER.or_null(),
    "rope_parameters": OBJECT.or_null(),
    "rope_scaling": OBJECT.or_null(),
    "tie_word_embeddings": SWITCH.or_null(),
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
SHAPES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"Without one of these, transformers takes the size of another model."
ROPE = dict.fromkeys(
    ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), NUMBER
)
"Of the keys in `rope_parameters` and `rope_scaling`."
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
    """None where there is none. Raises UsageError for one that is no text."""
    _check(config, {"model_type": TEXT.or_null()}, "", where)
    return config.get("model_type")


def check_types(config: Mapping, where: Path) -> None:
    """Raises UsageError for the first value of a wrong kind, and for heads that do not divide what they share.

    `where` is the config.json that it stands in, of a model that fitune trains.
    """
    _check(config, KINDS, "", where)
    for block in ("rope_parameters", "rope_scaling"):
        _check(config.get(block) or {}, ROPE, f"{block}.", where)
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


def check_shapes_are_there(config: Mapping, where: Path) -> None:
    if missing := next((key for key in SHAPES if key not in config), None):
        raise UsageError(f"{where}: key {missing!r} is missing")


def _check(values: Mapping, kinds: dict[str, Kind], block: str, where: Path) -> None:
    for key, kind in kinds.items():
        if key in values and not kind.holds(values[key]):
            raise UsageError(f"{where}: {block}{key} is {values[key]!r}, expected {kind.said}{CORRECT_IT}")
