"""Which linears of a decoder layer get an adapter: `lora.target_modules`, read as PEFT reads it."""

from fitune.config.recipe import Lora
from fitune.errors import UsageError, nearest

ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
LINEARS = ATTENTION | MLP
"Of a decoder layer of every architecture that is trained."


def adapted_linears(lora: Lora) -> frozenset[str]:
    """Their names. UsageError for a target that is none of them, such as the embedding or the head.

    FSDP does not gather the embedding for a gradient, and the loss takes the head's weight without an adapter.
    """
    targets = LINEARS if lora.target_modules == "all-linear" else lora.target_modules
    found = {target: _linear_named(target) for target in sorted(targets)}
    for target, linear in found.items():
        if linear is None:
            raise UsageError(f"lora.target_modules: '{target}' is not a linear of a layer{nearest(target, LINEARS)}")
    return frozenset(found.values())


def _linear_named(target: str) -> str | None:
    """A target is the end of a module's name: `up_proj`, `mlp.up_proj` or, of one layer, `layers.3.mlp.up_proj`."""
    number = next((part for part in target.split(".") if part.isdigit()), "0")
    layer = f".model.layers.{number}"
    modules = {name: f"{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}" for name in LINEARS}
    return next((name for name, module in modules.items() if module.endswith(f".{target}")), None)
