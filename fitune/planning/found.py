"""What a search for the fastest way came to: the choice, the next best, and why GPUs stay idle."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fitune.planning.fill import fits, with_room_for_error
from fitune.planning.machine import Gpu, Machine
from fitune.planning.outlook import shortfall
from fitune.planning.plan import Plan
from fitune.planning.words import described, numbers, rounded, timed

NO_GAIN = 0.02
"Of a step's seconds: for less, no further GPU is taken."
LESS_ROOM = "less memory would be left than the prediction may be off"


def has_room_for_error(plan: Plan) -> bool:
    """Whether it fits and leaves as much memory as the prediction may be off."""
    return fits(plan.setup, with_room_for_error(plan.limits))


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    plan: Plan
    "The fastest that fits."
    tried: list[Plan]
    "All others, the fastest that fit first, then those that come closest."
    machine: Machine
    "What it was searched on; of several, each."
    machines: int = 1

    @property
    def runner_up(self) -> Plan | None:
        """The fastest that differs in the number of GPUs, or in where the weights lie."""
        return next((plan for plan in self.tried if plan.fits and _kind(plan) != _kind(self.plan)), None)

    @property
    def gpus(self) -> int:
        """What the machines have, all of them together."""
        return len(self.machine.gpus) * self.machines

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
        why = "small states round more" if rounds else "too little faster for the RAM it takes"
        return f"{words} ({why if has_room_for_error(other) else LESS_ROOM})"

    @property
    def names_gpus(self) -> bool:
        """Whether it matters which of the GPUs are taken."""
        return any(plan.run.accelerate.gpu_ids for plan in (self.plan, *self.tried))

    @property
    def uneven(self) -> str | None:
        """What the GPUs that are used hold each other back by, in one line; None where they are alike."""
        said = replace(self.machine, gpus=self.plan.used_cards).uneven
        if said and self.machines > 1:
            return f"{said}; to leave GPUs out, set CUDA_VISIBLE_DEVICES on each machine"
        return said

    def why_idle(self) -> str | None:
        """Why GPUs stay idle, in one line; None if none does."""
        left_out = [*why_left_out(self), self._why_not_more()] if self.idle else []
        return "; ".join(filter(None, [*left_out, self._without_rows()])) or None

    def _without_rows(self) -> str | None:
        """Of machines that are given, each takes part, also where a step has no row for it."""
        rows, copies = self.plan.run.recipe.global_batch_size, self.plan.setup.replicas
        if copies <= rows or self.plan.setup.machines == 1:
            return None
        some = f"{copies - rows} of {copies} copies of the model have no row: a step has {rows} (global_batch_size)"
        return f"{some}; give fewer --machines, or --set global_batch_size={copies}"

    def _why_not_more(self) -> str | None:
        """Why not all of the GPUs are used among which the choice was made."""
        among = len(self.plan.cards) * self.machines
        idle = among - self.plan.setup.ranks if self.plan.setup.on_gpu else among
        if not idle:
            return None
        is_idle = f"{idle} of {among} GPUs {'stay' if idle > 1 else 'stays'} idle"
        if self.plan.run.accelerate.gpu_ids:
            is_idle = stay_idle(self.plan.cards[self.plan.setup.ranks :])
        if self.plan.setup.machines > 1 and self.plan.setup.ranks <= self.gpus // self.plan.setup.machines:
            return f"{is_idle}: one machine has as many as are used, and no network between them: leave out --machines"
        same = [plan for plan in self.tried if plan.cards == self.plan.cards]
        more = [plan for plan in same if plan.setup.ranks > self.plan.setup.ranks]
        if not more:
            return is_idle
        most = next(plan for plan in more if plan.setup.ranks == max(one.setup.ranks for one in more))
        if not most.fits:
            return f"{is_idle}: {described(most)} do not fit: {shortfall(most)}"
        other, rows = more[0], self.plan.run.recipe.global_batch_size
        ratio = other.time.parts["total"] / self.plan.time.parts["total"]
        if ratio > 1 + NO_GAIN:
            return f"{is_idle}: with {described(other)} it is slower, {timed(other)}"
        if not has_room_for_error(other):
            return f"{is_idle}: with {described(other)} it takes {timed(other)}, but {LESS_ROOM}"
        if ratio < 1 - NO_GAIN:
            return f"{is_idle}: {described(other)} are faster by less than the prediction may be off, {timed(other)}"
        as_long = f"a step of {rows} rows (global_batch_size) takes as long with {other.setup.ranks}"
        more_rows = f"; one of {math.ceil(rows / among) * among} would use all {among}"
        return f"{is_idle}: {as_long}{more_rows if rows % among else ''}"


def why_left_out(found: Found) -> Iterator[str]:
    """Why GPUs stay idle that were not among those that the choice was made of: a line for each kind of them."""
    kinds = {}
    for gpu in found.machine.gpus:
        if found.plan.setup.on_gpu and gpu not in found.plan.cards:
            kinds.setdefault((gpu.in_words, round(gpu.free_gib), gpu.link_gb_s), []).append(gpu)
    for gpus in kinds.values():
        reason = _why_without(found, gpus)
        yield f"{stay_idle(gpus)}: {reason}" if reason else stay_idle(gpus)


def _why_without(found: Found, gpus: Sequence[Gpu]) -> str:
    """What the chosen number of GPUs and more come to with some of `gpus` among them; '' where that was not tried."""
    if not gpus[0].model.has_bf16:
        return f"compute capability {gpus[0].model.capability:.1f} has no bf16"
    more = [plan for plan in found.tried if plan.setup.ranks > found.plan.setup.ranks]
    best = next((plan for plan in more if set(gpus) & set(plan.used_cards)), None)
    if best is None:
        return ""
    with_it = f"with {'them' if len(gpus) > 1 else 'it'}"
    if not best.fits:
        return f"{with_it} the run does not fit: {shortfall(best)}"
    if not best.time.is_known:
        return f"{with_it} a step is not shorter"
    theirs, ours = seconds_of(best), seconds_of(found.plan)
    if abs(theirs - ours) <= NO_GAIN * ours:
        return f"{with_it} a step takes as long"
    too_little = ", which is too little for the RAM it takes" if theirs < ours else ""
    return f"{with_it} {rounded(theirs)} s a step instead of {rounded(ours)}{too_little}"


def stay_idle(gpus: Sequence[Gpu]) -> str:
    """That they do, with their numbers and what they are."""
    names = ", ".join(dict.fromkeys(gpu.in_words for gpu in gpus))
    are_many = len(gpus) > 1
    return f"GPU{'s' * are_many} {numbers(gpus)} ({names}) {'stay' if are_many else 'stays'} idle"


def seconds_of(plan: Plan) -> float:
    """Of a step; 0 where there is no GPU to time."""
    return plan.time.parts["total"] if plan.time else 0.0


def best_of_each_kind(found: Found) -> list[Plan]:
    """What was tried, the best first: one plan for each number of GPUs and copies, and each place of the weights."""
    kinds = {}
    for plan in (found.plan, *found.tried):
        kinds.setdefault(_kind(plan), plan)
    return list(kinds.values())


def _kind(plan: Plan) -> tuple:
    s = plan.setup
    return s.ranks, s.replicas, s.offload, s.embedding_offload, s.small_states, s.optimizer_offload
