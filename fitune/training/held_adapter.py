"""A LoRA adapter from anywhere in the shape that sharded models hold one in: one rank and one scale for all modules.

Where ranks differ, A and B are filled up with zeros; where scales do, B takes up the difference.
"""

from dataclasses import dataclass

import torch

from fitune.config.stored_weights import EMBEDDING, HEAD
from fitune.errors import UsageError
from fitune.export.adapter import LINEAR, TOKEN_ROWS, AdapterFile, Lora, read_adapter


@dataclass(frozen=True)
class HeldAdapter:
    """Its shape, and for each parameter of the PeftModel the tensor that fills it, and a factor."""

    rank: int
    scale: float
    modules: list[str]
    "Full names of the linears."
    token_ids: list[int]
    "Tokens whose rows of embedding and head are its own."
    sources: dict[str, tuple[str, float]]

    def rows(self, file: AdapterFile, name: str, columns: int, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a parameter of `columns`, by the name that PEFT saves it under; float32."""
        tensor, factor = self.sources[name]
        stored = file[tensor].shape
        stop_stored = min(max(start, stop), stored[0])
        rows = torch.zeros(stop - start, columns)
        if start < stop_stored:
            rows[: stop_stored - start, : stored[1]] = factor * file.read_rows(tensor, start, stop_stored).float()
        return rows


def hold(file: AdapterFile) -> HeldAdapter:
    """UsageError for what `merge` does not understand, and for what sharded models cannot hold beside their weights."""
    lora = read_adapter(file)
    _refuse_what_needs_whole_weights(file, lora)
    modules = {name.removesuffix(".weight"): pair for name, pair in lora.pairs.items()}
    scale = max((abs(pair.scale) for pair in modules.values()), default=0.0) or 1.0
    sources = {}
    for module, pair in modules.items():
        sources[f"base_model.model.{module}.{LINEAR[0]}"] = pair.a, 1.0
        sources[f"base_model.model.{module}.{LINEAR[1]}"] = pair.b, pair.scale / scale
    for weight, (tensor, _) in lora.tokens.items():
        sources[f"base_model.model.{weight.removesuffix('.weight')}.{TOKEN_ROWS}"] = tensor, 1.0
    rank = max(file[pair.a].shape[0] for pair in modules.values())
    token_ids = lora.tokens[EMBEDDING][1] if lora.tokens else []
    return HeldAdapter(rank, scale, list(modules), token_ids, sources)


def _refuse_what_needs_whole_weights(file: AdapterFile, lora: Lora) -> None:
    """Sharded models have LoRA on the linears of their layers, and the same tokens trained in embedding and head."""
    outside = next((name for name in lora.pairs if not name.startswith("model.layers.")), None)
    tokens = [lora.tokens[name][1] if name in lora.tokens else None for name in (EMBEDDING, HEAD)]
    found = {
        "DoRA": any(pair.magnitude for pair in lora.pairs.values()),
        "LoRA on embeddings": bool(lora.embeddings),
        "trained biases": bool(lora.biases),
        "whole modules (modules_to_save)": bool(lora.replaced),
        "trained tokens of the embedding or the head alone": tokens[0] != tokens[1],
        f"LoRA on {outside}": outside is not None,
        "no LoRA": not lora.pairs,
    }
    if what := next((what for what, there in found.items() if there), None):
        raise UsageError(
            f"{file.folder}: {what} can be asked on one device only, beside weights as they are stored: merge it, "
            f"and give the merged model's folder"
        )
