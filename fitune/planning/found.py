"""What a search for the fastest way came to: the choice, the next best, and why GPUs stay idle."""

import math
from dataclasses import dataclass

from fitune.planning.outlook import shortfall
from fitune.planning.plan import Plan
from fitune.planning.words import described, timed

NO_GAIN = 0.02
"Of a step's seconds: for less, no further GPU is taken."


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    plan: Plan
    "The fastest that fits."
    tried: list[Plan]
    "All others, the fastest that fit first, then those that come closest."
    gpus: int
    "What the machines have, all of them together."

    @property
    def runner_up(self) -> Plan | None:
        """The fastest that differs in the number of GPUs, or in where the weights lie."""
        return next((plan for plan in self.tried if plan.fits and _kind(plan) != _kind(self.plan)), None)

    @property
    def idle(self) -> int:
        return self.gpus - self.plan.setup.ranks if self.plan.setup.on_gpu else self.gpus

    def in_one_line(self) -> str:
        """What was chosen, and the next best."""
        chosen = f"plan chose {described(self.plan)}, {timed(self.plan)}"
        return f"{chosen}; next best: {self.next_best}" if self.runner_up else chosen

    @property
    def next_best(self) -> str:
        """The runner-up in words; where it is faster, also why it was not taken."""
        other = self.runner_up
        words = f"{described(other)}, {timed(other)}"
        if seconds_of(other) >= (1 - NO_GAIN) * seconds_of(self.plan):
            return words
        rounds = other.setup.small_states and not self.plan.setup.small_states
        return f"{words} ({'small states round more' if rounds else 'too little faster for the RAM it takes'})"

    def why_idle(self) -> str | None:
        """Why GPUs stay idle, in one line; None if none does."""
        if not self.idle:
            return None
        is_idle = f"{self.idle} of {self.gpus} GPUs {'stay' if self.idle > 1 else 'stays'} idle"
        if self.plan.setup.machines > 1 and self.plan.setup.ranks <= self.gpus // self.plan.setup.machines:
            return f"{is_idle}: one machine has as many as are used, and no network between them: leave out --machines"
        more = [plan for plan in self.tried if plan.setup.ranks > self.plan.setup.ranks]
        if not more:
            return is_idle
        most = next(plan for plan in more if plan.setup.ranks == max(one.setup.ranks for one in more))
        if not most.fits:
            return f"{is_idle}: {described(most)} do not fit: {shortfall(most)}"
        other, rows = more[0], self.plan.run.recipe.global_batch_size
        ratio = other.time.parts["total"] / self.plan.time.parts["total"]
        if ratio > 1 + NO_GAIN:
            return f"{is_idle}: with {described(other)} it is slower, {timed(other)}"
        if ratio < 1 - NO_GAIN:
            return f"{is_idle}: {described(other)} are faster by less than the prediction may be off, {timed(other)}"
        as_long = f"a step of {rows} rows (global_batch_size) takes as long with {other.setup.ranks}"
        more_rows = f"; one of {math.ceil(rows / self.gpus) * self.gpus} would use all {self.gpus}"
        return f"{is_idle}: {as_long}{more_rows if rows % self.gpus else ''}"


def seconds_of(plan: Plan) -> float:
    """Of a step; 0 where there is no GPU to time."""
    return plan.time.parts["total"] if plan.time else 0.0


def best_of_each_kind(found: Found) -> list[Plan]:
    """What was tried, the best first: one plan for each number of GPUs and place of the weights."""
    kinds = {}
    for plan in (found.plan, *found.tried):
        kinds.setdefault(_kind(plan), plan)
    return list(kinds.values())


def _kind(plan: Plan) -> tuple:
    setup = plan.setup
    return setup.ranks, setup.offload, setup.embedding_offload, setup.small_states, setup.optimizer_offload
