"""What an adapter's folder says of itself in its small files. No tensor is read, so that `plan` can ask."""

from pathlib import Path

from fitune.config.json_file import read_json
from fitune.errors import UsageError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_RECORD = "fitune_base.json"
"Written by fitune beside an adapter: `fitune.weights.base_identity`."
IN_NF4 = "nf4"
"`computed_in` of a base record, where an adapter was trained beside weights in 4 bits."


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def read_adapter_config(folder: Path) -> dict:
    return read_json(folder / ADAPTER_CONFIG, "give the folder of a PEFT LoRA adapter")


def named_base(folder: Path, hint: str) -> tuple[str, str | None]:
    """The base that an adapter was trained on, and its revision. UsageError with `hint` where none is named."""
    config = read_adapter_config(folder)
    if not (base := config.get("base_model_name_or_path")):
        raise UsageError(f"{folder}: {ADAPTER_CONFIG} names no base; {hint}")
    return base, config.get("revision")


def was_trained_in_nf4(folder: Path) -> bool:
    """As far as is known: adapters from elsewhere do not say."""
    file = folder / BASE_RECORD
    return file.is_file() and read_json(file, "train it again").get("computed_in") == IN_NF4


def ranks(config: dict) -> list[int]:
    """Of an adapter_config.json: the rank of all modules, and those that it gives to some."""
    found = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    return [rank for rank in found if isinstance(rank, int) and rank > 0]


def trained_tokens(config: dict) -> int:
    """Of an adapter_config.json: how many tokens of the embedding, or of another module, have rows of their own."""
    found = config.get("trainable_token_indices") or []
    return max(map(len, found.values() if isinstance(found, dict) else [found]), default=0)
