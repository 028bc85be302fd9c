"""What the network between several machines costs a step, as planned and otherwise: `plan` says it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from fitune.config.optimizers import is_adamw
from fitune.errors import UsageError
from fitune.planning.outlook import shortfall
from fitune.planning.plan import Plan
from fitune.planning.search import FitsNowhere
from fitune.planning.step_time import ADDING_UP
from fitune.planning.words import rounded

REPLICAS = "profile.replicas"


@dataclass(frozen=True)
class Way:
    """A run on several machines: the same one with a few settings changed."""

    changes: dict[str, str]
    "`--set` keys and values; none: as planned."
    plan: Plan

    @property
    def typed(self) -> str:
        return " ".join(f"--set {key}={value}" for key, value in self.changes.items())

    @property
    def network_seconds(self) -> float:
        """Of a step, beside computing or, where each GPU holds a whole copy, after it."""
        return self.plan.time.parts["network"] + self.plan.time.parts.get(ADDING_UP, 0.0)

    def as_json(self) -> dict:
        parts = self.plan.time.parts
        return {
            "set": self.changes, "fits": self.plan.fits, "replicas": self.plan.setup.replicas,
            "network_seconds": round(self.network_seconds, 3), "compute_seconds": round(parts["compute"], 3),
            "step_seconds": round(parts["total"], 3),
        }  # fmt: skip


def ways_to_spread(plan: Plan, planned: Callable[[tuple[str, ...]], Plan]) -> list[Way]:
    """The plan, then what its machines could do instead. [] for one machine.

    `planned` is what the same command finds with further `--set`. Where nothing fits so, what comes closest says what
    it lacks; what is refused for another reason is left out.
    """
    if plan.setup.machines == 1 or plan.time is None or not plan.time.is_known:
        return []
    by_machine = {REPLICAS: str(plan.setup.machines)}
    others = [{REPLICAS: "1"} if plan.setup.replicas > 1 else by_machine]
    if plan.setup.full and not plan.setup.small_states and is_adamw(plan.run.recipe.training):
        others.append({"profile.optimizer_state": "bf16_8bit", **by_machine})
    ways = [Way({}, plan)]
    for changes in others:
        with suppress(UsageError):
            ways.append(Way(changes, _found_or_nearest(planned, changes)))
    return ways


def _found_or_nearest(planned: Callable[[tuple[str, ...]], Plan], changes: dict[str, str]) -> Plan:
    try:
        return planned(tuple(f"{key}={value}" for key, value in changes.items()))
    except FitsNowhere as refused:
        return refused.nearest


def network_lines(ways: list[Way]) -> list[str]:
    """In words, one line each."""
    if not ways:
        return []
    planned, others = ways[0], ways[1:]
    copies = planned.plan.setup.replicas
    how = f"{copies} copies of the model, gradients travel" if copies > 1 else "one copy over all GPUs, weights travel"
    lines = [f"between {planned.plan.setup.machines} machines ({how}): {_seconds(planned)}"]
    for other in others:
        outcome = _seconds(other) if other.plan.fits else f"does not fit: {shortfall(other.plan)}"
        lines.append(f"with {other.typed}: {outcome}")
    return lines


def _seconds(way: Way) -> str:
    computing = way.plan.time.parts["compute"]
    return f"{rounded(way.network_seconds)} s of a step beside {rounded(computing)} s of computing"
