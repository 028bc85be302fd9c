"""Which of transformers' optimizers train sharded weights and resume on any ranks, and what the others lack."""

from typing import Any

from fitune.config.installed_names import training_enums
from fitune.errors import UsageError, nearest

DEFAULT = "adamw_torch_fused"
ARGUMENTS = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "sgd": ("momentum", "dampening", "nesterov"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    "adagrad": ("lr_decay", "eps"),
}
"""The optimizers that work, with what `optim_args` may hold: torch's own, which compute each weight for itself, so that
a rank needs nothing but its rows."""
ADAM_FIELDS = ("adam_beta1", "adam_beta2", "adam_epsilon")
PACKAGES = {
    "adamw_torch_xla": "torch_xla", "adamw_torch_npu_fused": "torch_npu", "adamw_anyprecision": "torchdistx",
    "adamw_torch_4bit": "torchao", "adamw_torch_8bit": "torchao", "grokadamw": "grokadamw", "lomo": "lomo_optim",
    "adalomo": "lomo_optim", "stable_adamw": "optimi", "galore": "galore_torch", "apollo": "apollo_torch",
    "schedule_free": "schedulefree",
}  # fmt: skip
"Where optimizers come from that neither torch, transformers nor bitsandbytes has, by the start of their names."


def refuse_unfit_optimizer(training: dict[str, Any], source: str) -> None:
    """Raises UsageError, which names the nearest optimizer that works, or settings that this one would ignore."""
    name = training.get("optim", DEFAULT)
    if name not in ARGUMENTS:
        raise UsageError(f"{source}: training.optim={name} {_lacks(name)}; the nearest that works: {nearest_fit(name)}")
    if not is_adamw(training) and (given := [field for field in ADAM_FIELDS if field in training]):
        raise UsageError(f"{source}: training.{given[0]} is AdamW's, training.optim={name} would ignore it; remove it")
    for key in optimizer_arguments(training, source):
        if key == "weight_decay":
            raise UsageError(f"{source}: training.optim_args: set training.weight_decay instead")
        if key not in ARGUMENTS[name]:
            hint = nearest(key, ARGUMENTS[name]) if ARGUMENTS[name] else f"; {name} takes none"
            raise UsageError(f"{source}: training.optim_args: {name} has no argument '{key}'{hint}")


def is_adamw(training: dict[str, Any]) -> bool:
    return training.get("optim", DEFAULT).startswith("adamw")


def takes_bf16_gradients(training: dict[str, Any]) -> bool:
    """Whether its step is fitune's own, which takes them for float32 weights; torch's take one dtype for both."""
    return training.get("optim", DEFAULT) == "adamw_torch_fused"


def optimizer_arguments(training: dict[str, Any], source: str = "") -> dict[str, str]:
    """`optim_args`, which is written `key=value,key=value`, taken apart."""
    pairs = [pair.partition("=") for pair in str(training.get("optim_args") or "").replace(" ", "").split(",") if pair]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise UsageError(f"{source}: training.optim_args: expected key=value,key=value, as in momentum=0.9")
        if key not in ("nesterov", "centered") and not _is_number(value):
            raise UsageError(f"{source}: training.optim_args: {key}={value} is not a number")
    return {key: value for key, _, value in pairs}


def numbers_per_weight(training: dict[str, Any]) -> int:
    """How many float32 numbers the optimizer keeps for each weight that is trained."""
    name, arguments = training.get("optim", DEFAULT), optimizer_arguments(training)
    has_momentum = float(arguments.get("momentum", 0)) > 0
    if name == "sgd":
        return int(has_momentum)
    if name == "rmsprop":
        return 1 + has_momentum + (arguments.get("centered", "").lower() in ("true", "1", "yes"))
    return 1 if name == "adagrad" else 2


def all_optimizers() -> tuple[str, ...]:
    return training_enums()["OptimizerNames"]


def nearest_fit(name: str) -> str:
    """Of the optimizers that work, the one that does most nearly what `name` would do."""
    if name in ("adafactor", "galore_adafactor", "galore_adafactor_layerwise") or "rmsprop" in name or "lion" in name:
        return "rmsprop"  # one number per weight, as those have or less
    return "sgd" if name.endswith(("lomo", "sgd")) else DEFAULT


def _lacks(name: str) -> str:
    package = next((package for start, package in PACKAGES.items() if name.startswith(start)), None)
    if package:
        return f"comes from the package {package}, which is not among fitune's"
    if name == "adafactor":
        return "keeps sums over rows and columns, which are not split over ranks as the weights are"
    return "is bitsandbytes', which knows no sharded weights"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
