"""The folder that `generate` and `eval` are asked about, a model's or an adapter's: what of it takes memory."""

from dataclasses import dataclass
from pathlib import Path

from fitune.config.adapter_folder import (
    is_adapter,
    named_base,
    ranks,
    read_adapter_config,
    trained_tokens,
    was_trained_in_nf4,
)
from fitune.config.model_shapes import ModelShape, find_shape


@dataclass(frozen=True)
class AskedFolder:
    """A model's sizes, and those of the adapter beside it if there is one."""

    shape: ModelShape
    lora_r: int = 0
    "The largest rank of its modules."
    lora_targets: frozenset[str] = frozenset()
    "Linears of a layer that it adapts."
    trained_tokens: int = 0
    "Tokens whose rows of embedding and head are its own."
    in_nf4: bool = False
    "Whether it was trained beside weights in NF4, and so is asked beside them."


def is_asked_as_folder(given: str | Path) -> bool:
    """Whether it is a model's or an adapter's folder: no recipe, no run."""
    folder = Path(given)
    is_one = (folder / "config.json").is_file() or is_adapter(folder)
    return is_one and not (folder / "run.yaml").exists()


def asked_folder(folder: Path) -> AskedFolder:
    """Reads the small files. Raises UsageError for an architecture that fitune does not know."""
    if not is_adapter(folder):
        return AskedFolder(find_shape(str(folder)))
    shape = find_shape(*named_base(folder, "merge it with --base MODEL and give that folder"))
    config = read_adapter_config(folder)
    targets = config.get("target_modules")
    named = targets if isinstance(targets, list) else list(shape.linears)  # else an expression, or all linears
    adapted = {name for name in shape.linears if any(f".{target}".endswith(f".{name}") for target in named)}
    rank, tokens = max(ranks(config), default=0), trained_tokens(config)
    return AskedFolder(shape, rank, frozenset(adapted), tokens, was_trained_in_nf4(folder))
