"""What products in fp8 would bring to a plan in bf16: `plan` says so, since `auto` does not take them."""

from collections.abc import Callable
from contextlib import suppress

from fitune.config import run as runs
from fitune.config.schema import AUTO
from fitune.errors import UsageError
from fitune.planning.found import NO_GAIN, seconds_of
from fitune.planning.plan import Plan
from fitune.planning.words import held, timed

MEASURED_ON, MEASURED_GPUS = "H200", {"full": 2, "lora": 1, "qlora": 1}
"""That many GPUs at most, which held all weights: 8B QLoRA and LoRA, 70B QLoRA (benchmarks/results/
peers-h200-2026-11-27*.json), 8B in full (peers-h200x2-2026-11-29d.json)."""
FP8 = "profile.compute=fp8"


def better_in_fp8(
    plan: Plan, profile: str | None, sets: tuple[str, ...], planned: Callable[[tuple[str, ...]], Plan]
) -> Plan | None:
    """What `planned` makes of the run in fp8; None where it brings nothing, or nobody may say so.

    What a profile or `--set` says of `compute` stays as it is.
    """
    if not plan.setup.on_gpu or not _leaves_it_open(profile, sets):
        return None
    with suppress(UsageError):  # the card has no fp8
        other = planned((*sets, FP8))
        if other.fits and other.time.is_known and (not plan.fits or _is_shorter(other, plan)):
            return other
    return None


def _leaves_it_open(profile: str | None, sets: tuple[str, ...]) -> bool:
    """Whether neither `--set` nor the profile says in what is multiplied."""
    _, given = runs.parse_sets(sets)
    return given.get("compute", runs.load_profile(profile).compute if profile else AUTO) == AUTO


def _is_shorter(one: Plan, other: Plan) -> bool:
    return seconds_of(one) < (1 - NO_GAIN) * seconds_of(other)


def offer(other: Plan, plan: Plan) -> str:
    """What `other`, in fp8, has better than `plan`, in one line: what to type, and where its price is told."""
    changed = "" if held(other) == held(plan) else f"{held(other)}, "
    guess = "" if is_measured(other) else ", a guess"
    return f"{changed}{timed(other)}{guess}: --set {FP8} (rounds more: docs/fp8.md)"


def note(plan: Plan) -> str:
    """Of a run in fp8: whether its time was measured; on a CPU, that it is emulated."""
    if not plan.setup.on_gpu:
        return "products in fp8 (emulated on the CPU: the same arithmetic, slower)"
    guess = f" (its time was measured on up to {MEASURED_GPUS[plan.setup.method]} {MEASURED_ON}, and is a guess here)"
    return f"products in fp8{'' if is_measured(plan) else guess}"


def is_measured(plan: Plan) -> bool:
    there = plan.time is not None and plan.time.gpu == MEASURED_ON
    setup = plan.setup
    elsewhere = setup.offload or (setup.full and (setup.optimizer_offload or setup.activation_offload))
    return there and setup.ranks <= MEASURED_GPUS[setup.method] and not elsewhere
