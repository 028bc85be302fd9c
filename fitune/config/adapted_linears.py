"""Which linears of a decoder layer get an adapter: `lora.target_modules`, read as PEFT reads it."""

from fitune.config.recipe import Lora
from fitune.errors import UsageError, nearest

ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
LINEARS = ATTENTION | MLP
"Of a decoder layer of every architecture that is trained."


def adapted_linears(lora: Lora, layers: int) -> frozenset[str]:
    """Their names, of a model with so many `layers`; one that a single layer's target names counts as any other.

    UsageError for a target that is none of them, such as the embedding or the head: FSDP does not gather the embedding
    for a gradient, and the loss takes the head's weight without an adapter. Also for none, and for a layer that is not
    there, which PEFT leaves out without a word.
    """
    targets = LINEARS if lora.target_modules == "all-linear" else lora.target_modules
    if not targets:
        raise UsageError(f"lora.target_modules is empty; allowed: all-linear, or some of {', '.join(sorted(LINEARS))}")
    found = {target: _linear_named(target) for target in sorted(targets)}
    for target, linear in found.items():
        if linear is None:
            raise UsageError(f"lora.target_modules: '{target}' is not a linear of a layer{nearest(target, LINEARS)}")
        if (number := _layer_named(target)) not in map(str, range(layers)):
            raise UsageError(f"lora.target_modules: '{target}': no layer {number}; allowed: 0 to {layers - 1}")
    return frozenset(found.values())


def _layer_named(target: str) -> str:
    """The number in it. A target without one is of all layers, and so of the first one."""
    return next((part for part in target.split(".") if part.isdigit()), "0")


def _linear_named(target: str) -> str | None:
    """A target is the end of a module's name: `up_proj`, `mlp.up_proj` or, of one layer, `layers.3.mlp.up_proj`."""
    layer = f".model.layers.{_layer_named(target)}"
    modules = {name: f"{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}" for name in LINEARS}
    return next((name for name, module in modules.items() if module.endswith(f".{target}")), None)
