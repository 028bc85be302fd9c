"""The fastest way to train a recipe on a machine: which of its GPUs, what lies in host RAM, rows and kept layers.

GPUs that differ are tried together, where the weakest counts, and without those that hold the others back. Each number
of ranks is tried with weights on the GPUs, with the embedding in host RAM and with all weights there; full fine-tuning
also with small optimizer states, which may lie in host RAM. `fitune.planning.fill` then finds the rows a pass, the kept
layers, and whether the inputs of the others lie in host RAM. The shortest predicted step wins.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fitune.config import run as runs
from fitune.config.accelerate_config import DEFAULT_PORT
from fitune.config.hints import became
from fitune.config.optimizers import is_adamw
from fitune.config.recipe import Recipe
from fitune.config.run import FOUND
from fitune.config.schema import AUTO, AccelerateConfig, Profile, Run
from fitune.config.shipped import name_of
from fitune.config.yaml_file import parse
from fitune.errors import UsageError
from fitune.planning.fill import filled, fits, gain_by_moving, with_room_for_error
from fitune.planning.found import NO_GAIN, Found, has_room_for_error, seconds_of
from fitune.planning.gpu_models import GpuModel
from fitune.planning.instead import what_fits
from fitune.planning.limits import limits_here
from fitune.planning.machine import Machine
from fitune.planning.memory import host_peak
from fitune.planning.outlook import no_gpu, shortfall
from fitune.planning.plan import GPU_COUNT, TIME_ERROR, Plan, make_plan
from fitune.planning.presets import preset_runs
from fitune.planning.sizes import GIB
from fitune.planning.words import (
    ALL_IN_RAM,
    EMBEDDING_IN_RAM,
    ON_GPUS,
    STATES_IN_RAM,
    described,
    machine_in_words,
)  # fmt: skip

PLACES = (ON_GPUS, STATES_IN_RAM, EMBEDDING_IN_RAM, ALL_IN_RAM)
OTHER_STATES = 0.5
"Of a step, for small optimizer states, which round what float32 keeps: they must be worth it."


class FitsNowhere(UsageError):
    """No way to train a recipe fits a machine; `nearest` is what comes closest."""

    def __init__(self, text: str, nearest: Plan):
        super().__init__(text)
        self.nearest = nearest


def find(
    recipe_name: str, sets: tuple[str, ...], machine: Machine, gpu: GpuModel | None = None, *,
    output: str | None = None, machines: int = 1, network: float | None = None,
) -> Found:  # fmt: skip
    """The fastest way to train a recipe on `machine`, or on as many like it.

    What `sets` gives of a profile is as given. `gpu` is the model whose speed counts, `network` what lies between
    machines, in GB/s. Raises FitsNowhere, which names what comes closest, and UsageError for what cannot be tried.
    """
    stem = name_of(recipe_name)
    machine.refuse_missing_gpus()
    if machines > 1 or not machine.with_bf16.gpus:
        machine.refuse_missing_bf16()
    options = {"output": output, "machines": machines, "network": network}
    plans = _tried(recipe_name, sets, machine, gpu, **options)
    if not plans:
        raise UsageError(f"{stem}: {_why_none(stem, recipe_name, sets, machine, machines)}")
    best = _fewest_ranks(plans)
    if not best.fits:
        raise FitsNowhere(f"{stem} {_why_not(best, recipe_name, sets, machine, **options)}", best)
    return Found(best, [plan for plan in plans if plan is not best], machine, machines)


def _tried(
    recipe_name: str, sets: tuple[str, ...], machine: Machine, gpu: GpuModel | None, *, output: str | None,
    machines: int, network: float | None,
) -> list[Plan]:  # fmt: skip
    """All that can be tried, filled: the fastest that fit first, then those that come closest.

    Several machines start by one file, and a GPU's name means another one on each: all of their GPUs count.
    """
    recipe_overrides, profile_overrides = runs.parse_sets(sets)
    recipe, stem = runs.load_recipe(recipe_name, recipe_overrides), name_of(recipe_name)
    machine = machine.at_most(profile_overrides.get("gpu_memory_gib"), profile_overrides.get("host_memory_gib"))
    if "accelerate_config" in profile_overrides:
        raise UsageError("--set profile.accelerate_config: give --profile too; without one, plan finds both")
    if not machine.gpus:
        candidates = _on_the_cpu(stem, recipe, profile_overrides, output)
        return sorted(_plans(candidates, machine, gpu, network), key=_rank)
    _refuse_too_many(profile_overrides, machine, machines)
    parts = [machine] if machines > 1 else list(machine.with_bf16.parts())
    plans = []
    for part in parts:
        fewer = max((len(other.gpus) for other in parts if set(other.gpus) < set(part.gpus)), default=0)
        counts = range(fewer + 1, len(part.gpus) + 1)  # fewer are as fast or faster on a smaller part
        candidates = _candidates(stem, recipe, profile_overrides, part, counts, machines, output)
        plans += _plans(candidates, part, gpu, network, names_gpus=part.gpus != machine.gpus)
    return sorted(plans, key=_rank)


def _why_none(stem: str, recipe_name: str, sets: tuple[str, ...], machine: Machine, machines: int) -> str:
    """Why nothing can be tried: no GPU, or what is set. Raises UsageError where that is refused by itself."""
    if not machine.gpus:
        return no_gpu()
    recipe_overrides, overrides = runs.parse_sets(sets)
    placed = {"embedding_offload": False, "optimizer_state": "fp32", "optimizer_offload": False} | overrides
    _run(stem, runs.load_recipe(recipe_name, recipe_overrides), placed, machine, machines, machines, PLACES[0], None)
    return f"no way to train has all that is set: {', '.join(f'profile.{key}' for key in overrides)}; leave one out"


def _why_not(nearest: Plan, recipe_name: str, sets: tuple[str, ...], machine: Machine, **options) -> str:
    """Where nothing fits: what comes closest, and what fits instead."""
    there = machine_in_words(machine)

    def does_fit(recipe: str) -> bool:
        with suppress(UsageError):  # what is set is not for its method
            return any(plan.fits for plan in _tried(recipe, sets, machine, None, **options))
        return False

    closest = f"does not fit {there}; nearest: {described(nearest)}: {shortfall(nearest)}"
    if not machine.gpus:
        return f"{closest}; {no_gpu()}"
    ways = [what_fits(nearest, does_fit), _ram_that_fits(recipe_name, sets, machine, **options)]
    other = " or ".join(filter(None, ways))
    return f"{closest}; what fits: {other}" if other else closest


def _ram_that_fits(recipe_name: str, sets: tuple[str, ...], machine: Machine, **options) -> str:
    """How much free RAM would do beside these GPUs, in whole GiB; '' where more does not help."""

    def fitting(gib: float) -> list[Plan]:
        plans = _tried(recipe_name, sets, replace(machine, host_available_gib=gib), None, **options)
        return [plan for plan in plans if plan.fits]

    if machine.unified or not (plans := fitting(math.inf)):
        return ""
    too_little = int(machine.host_available_gib)
    enough = max(too_little + 1, math.ceil(min(host_peak(plan.setup) for plan in plans) / GIB))  # filled for speed
    while enough - too_little > 1:
        half = (enough + too_little) // 2
        too_little, enough = (too_little, half) if fitting(half) else (half, enough)
    return f"{enough} GiB of free RAM"


def _refuse_too_many(overrides: dict, machine: Machine, machines: int) -> None:
    """Raises UsageError for a number of GPUs, or of copies on them, that there can't be."""
    asked, there = overrides.get("num_gpus"), len(machine.gpus)
    if asked is not None and asked not in (count * machines for count in range(1, there + 1)):
        each = f", and each of {machines} machines takes as many" if machines > 1 else ""
        raise UsageError(f"--set profile.num_gpus={asked}: this machine has {there}{each}")
    copies = overrides.get("replicas", AUTO)
    possible = {count for gpus in range(1, there + 1) for count in runs.possible_replicas(gpus * machines, machines)}
    if copies not in (AUTO, *possible):
        allowed = ", ".join(map(str, sorted(possible)))
        raise UsageError(f"--set profile.replicas={copies}: {there * machines} GPUs can hold {allowed} or auto")


def _candidates(
    stem: str, recipe: Recipe, overrides: dict, machine: Machine, counts: Iterable[int], machines: int,
    output: str | None,
) -> Iterator[Run]:  # fmt: skip
    """Each number of ranks a machine with every placement, rows and kept layers left to fill."""
    if "num_gpus" in overrides:
        counts = [count for count in counts if count * machines == overrides["num_gpus"]]
    if (copies := overrides.get("replicas", AUTO)) != AUTO:
        counts = [count for count in counts if copies in runs.possible_replicas(count * machines, machines)]
    for count in counts:
        for place in PLACES[:1] if machine.unified else PLACES:
            if place == EMBEDDING_IN_RAM and recipe.method == "full":
                continue
            for states in _states(recipe, place):
                placed = {"embedding_offload": place == EMBEDDING_IN_RAM}
                placed |= {"optimizer_state": states, "optimizer_offload": place == STATES_IN_RAM}
                if all(overrides.get(key, value) == value for key, value in placed.items()):
                    yield _run(stem, recipe, overrides | placed, machine, count * machines, machines, place, output)


def _states(recipe: Recipe, place: str) -> tuple[str, ...]:
    """The optimizer states to try there. With weights in RAM a step of small ones would run on the CPU, slowly."""
    may_be_small = recipe.method == "full" and is_adamw(recipe.training) and place != ALL_IN_RAM
    small = ("bf16_8bit",) if may_be_small else ()
    return small if place == STATES_IN_RAM else ("fp32", *small)


def _plans(
    candidates: Iterator[Run], machine: Machine, gpu: GpuModel | None, network: float | None, *,
    names_gpus: bool = False,
) -> list[Plan]:  # fmt: skip
    """The candidates, filled. Of the ranks whose GPUs hold everything anyway, those with less on them are left out.

    `gpu` is the model whose speed counts, None: the machine's. With `names_gpus` the runs take its GPUs by name.
    """
    plans, hold_all, limits, gpu = [], set(), limits_here(machine), gpu or machine.model
    for run in candidates:
        ranks = run.accelerate.num_processes
        if ranks not in hold_all:
            run = filled(with_gpus(run, machine) if names_gpus else run, limits, gpu, network)
            plans.append(replace(make_plan(run, limits, gpu, network=network), cards=machine.gpus))
            hold_all |= {ranks} if _holds_all(plans[-1]) else set()
    return plans


def with_gpus(run: Run, machine: Machine | None) -> Run:
    """The run, whose ranks take the first GPUs of `machine` by name; None: the first that they see."""
    gpu_ids = machine.first(run.accelerate.num_processes).gpu_ids if machine else None
    return run.model_copy(update={"accelerate": run.accelerate.model_copy(update={"gpu_ids": gpu_ids})})


def with_fastest_gpus(run: Run, machine: Machine) -> Run:
    """A run of one machine on the GPUs that are fastest for as many ranks as it has."""
    ranks = run.accelerate.num_processes
    parts = [part for part in machine.with_bf16.parts() if len(part.gpus) >= ranks]
    if not parts:
        return with_gpus(run, None)  # too few, which is refused where all is checked
    best = min(parts, key=lambda part: _rank(make_plan(run, limits_here(part), part.model)))
    return with_gpus(run, best if best.gpus != machine.gpus else None)


def _holds_all(plan: Plan) -> bool:
    """Whether nothing could be kept or passed at once in more memory."""
    setup, rows = plan.setup, math.ceil(plan.run.recipe.global_batch_size / plan.setup.ranks)
    most = {"micro_batch": rows, "accumulation": 1, "kept_layers": setup.shape.layers}
    everything = replace(setup, **most, reshard=not plan.run.may_keep_gathered)
    return setup.on_gpu and fits(everything, with_room_for_error(plan.limits))


def _run(
    stem: str, recipe: Recipe, values: dict, machine: Machine, ranks: int, machines: int, place: str, output: str | None
) -> Run:
    name = f"{'offload_' if place == ALL_IN_RAM else ''}{ranks}x{machine.card_gib:.0f}gb"
    output = str(Path(output or f"runs/{stem}-{name}").absolute())
    stated = {
        "description": "Found by plan.", "accelerate_config": FOUND, "num_gpus": ranks,
        "gpu_memory_gib": machine.card_gib, "host_memory_gib": machine.host_total_gib, "fits": {"any": [recipe.method]},
    }  # fmt: skip
    profile = parse(Profile, stated | values, "--set", became)
    accelerate = AccelerateConfig(
        path=str(Path(output) / FOUND), num_processes=ranks, num_machines=machines, mixed_precision="bf16",
        offload_params=place == ALL_IN_RAM, main_process_port=DEFAULT_PORT if machines > 1 else 0,
    )  # fmt: skip
    return runs.run_of(stem, recipe, name, profile, accelerate, output)


def _on_the_cpu(stem: str, recipe: Recipe, overrides: dict, output: str | None) -> Iterator[Run]:
    """The shipped profiles without GPUs, where the recipe's model is one for them."""
    for run in preset_runs(stem, recipe, overrides):
        if run.accelerate.use_cpu:
            yield runs.in_folder(run, str(Path(output or f"runs/{stem}-{run.profile_name}").absolute()))


def _rank(plan: Plan) -> tuple:
    """What fits with room for the prediction's error comes first, then what fits, then what comes closest to it."""
    if not plan.fits:
        return (2, *_distance(plan))
    return not has_room_for_error(plan), _cautious_seconds(plan)


def _cautious_seconds(plan: Plan) -> float:
    """Of a step. What takes host RAM must be faster: by more than the prediction may be off, if it lasts."""
    setup = plan.setup
    holds_what_lasts = setup.embedding_in_ram or setup.optimizer_offload
    cautious = seconds_of(plan) * (1 + OTHER_STATES * setup.small_states)
    return cautious * (1 + TIME_ERROR * holds_what_lasts) * gain_by_moving(setup)


def _fewest_ranks(plans: list[Plan]) -> Plan:
    """Of the plans that are as good as the first, the one that leaves most GPUs to others."""
    first = plans[0]
    if not first.fits:
        return first
    most = (1 + NO_GAIN) * _cautious_seconds(first)
    as_good = [
        plan for plan in plans if plan.fits and _rank(plan)[0] == _rank(first)[0] and _cautious_seconds(plan) <= most
    ]
    return min(as_good, key=lambda plan: (plan.setup.ranks, _cautious_seconds(plan)))


def _distance(plan: Plan) -> tuple[float, float]:
    """How far a plan is from fitting: GPUs first, then the worst share of a resource."""
    short = [verdict for verdict in plan.verdicts if not verdict.fits]
    missing = sum(verdict.needs - verdict.has for verdict in short if verdict.resource == GPU_COUNT)
    return missing, max((v.needs / max(v.has, 1e-9) for v in short if v.resource != GPU_COUNT), default=0.0)
