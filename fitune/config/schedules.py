"""The arguments of transformers' learning rate schedules: what `lr_scheduler_kwargs` may hold, and what it must."""

import math
from typing import Any

from fitune.errors import UsageError, nearest

_MIN_LR = ("min_lr", "min_lr_rate", "num_cycles")
_OF_TORCH = ("factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps")
ARGUMENTS = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "reduce_lr_on_plateau": _OF_TORCH,
    "cosine_with_min_lr": _MIN_LR,
    "cosine_warmup_with_min_lr": (*_MIN_LR, "warmup_lr_rate"),
    "warmup_stable_decay": (
        *("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    ),
}
NEEDED = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"One of these, at least."


def refuse_unfit_schedule(training: dict[str, Any], source: str) -> None:
    """Raises UsageError for arguments that the schedule does not have, and for those it lacks."""
    name = training.get("lr_scheduler_type", "linear")
    if name not in ARGUMENTS:
        raise UsageError(
            f"{source}: training.lr_scheduler_type={name} is not known to resume exactly; the nearest that is: "
            f"reduce_lr_on_plateau"
        )
    given = training.get("lr_scheduler_kwargs") or {}
    where = f"{source}: training.lr_scheduler_kwargs"
    if not isinstance(given, dict):
        raise UsageError(f"{where}: expected a mapping, as in {{min_lr: 1e-6}}, not {given!r}")
    for key in given:
        if key not in ARGUMENTS[name]:
            hint = nearest(key, ARGUMENTS[name]) if ARGUMENTS[name] else "; it takes none"
            raise UsageError(f"{where}: schedule {name} has no argument '{key}'{hint}")
        if isinstance(given[key], float) and not math.isfinite(given[key]):
            raise UsageError(f"{where}.{key}: {given[key]} is not a finite number")
    needed = NEEDED.get(name, ())
    if needed and not any(key in given for key in needed):
        raise UsageError(
            f"{where}: schedule {name} needs {' or '.join(needed)}, as in "
            f"training.lr_scheduler_kwargs.{needed[0]}={'10' if 'steps' in needed[0] else '1e-6'}"
        )
