"""Searches over plans: the nearest change that fits, the largest batch, the best profile, the matrix of all tiers."""

import math
from dataclasses import dataclass, replace
from itertools import combinations

from fitune.config import run as runs
from fitune.config.accelerate_config import read_accelerate_config
from fitune.config.command_name import command
from fitune.config.schema import AUTO, SMALLEST, AccelerateConfig, Lora, Profile, Recipe, Run
from fitune.config.shipped import ACCELERATE_CONFIGS, PROFILES, find, name_of, names
from fitune.config.yaml_file import parse
from fitune.errors import UsageError
from fitune.planning.fill import filled, fits, largest
from fitune.planning.hardware import GpuModel, Machine
from fitune.planning.limits import Limits, limits_here, limits_of
from fitune.planning.memory import gpu_peak, host_peak
from fitune.planning.plan import GPU_COUNT, TIME_ERROR, Plan, make_plan
from fitune.planning.sizes import GIB, Setup

MAX_MICRO_BATCH = 1024
SEQUENCE_STEP = 64  # tokens
METHODS = ("qlora", "lora", "full")
CARD_SLACK = 1.1
"A card of 24 GiB may have no more than 22 free."
NO_GPU = (
    "there is no GPU here: plan for another machine, as with --gpus 1 --gpu-memory 24 --host-memory 64, or try "
    "tiny_qlora with cpu_2proc"
)


@dataclass(frozen=True)
class Outlook:
    """What else would fit where a plan was made for."""

    changes: list[str]
    "The nearest changes that fit, as they are typed; none where the plan itself fits."
    largest_micro_batch: int
    "With no layer kept."
    longest_sequence: int
    "Tokens, with one row a pass and no layer kept."


def look_around(plan: Plan) -> Outlook:
    """Everything that `plan` says beside the run that was asked for."""
    recomputed = replace(plan.setup, kept_layers=0)
    return Outlook(
        [] if plan.fits else nearest_changes(plan),
        largest_micro_batch(recomputed, plan.limits),
        longest_sequence(recomputed, plan.limits),
    )


def largest_micro_batch(setup: Setup, limits: Limits) -> int:
    """Rows per pass that fit; 0 if not even one does."""
    return largest(MAX_MICRO_BATCH, lambda count: fits(replace(setup, micro_batch=count), limits))


def longest_sequence(setup: Setup, limits: Limits) -> int:
    """max_length that fits with one row per pass, within the model's positions; 0 if none does."""
    most = setup.shape.max_positions // SEQUENCE_STEP
    with_one_row = replace(setup, micro_batch=1)

    def does_fit(steps: int) -> bool:
        return fits(replace(with_one_row, max_length=steps * SEQUENCE_STEP), limits)

    return SEQUENCE_STEP * largest(most, does_fit)


def nearest_changes(plan: Plan) -> list[str]:
    """The smallest changes to a run that make it fit: one setting, else two, and profiles for the same hardware."""
    changes = _settings(plan)
    found = [text for text, change in changes if fits(replace(plan.setup, **change), plan.limits)]
    if not found:
        for (text, change), (other_text, other) in combinations(changes, 2):
            if not change.keys() & other.keys() and fits(replace(plan.setup, **change | other), plan.limits):
                found.append(f"{text} {other_text}")
                break
    return [*found[:2], *_profiles_that_fit(plan)[:1]]


def _settings(plan: Plan) -> list[tuple[str, dict]]:
    """Changes worth trying, what costs least speed first, as they are typed and as they act."""
    setup, run = plan.setup, plan.run
    changes = []
    for rows in reversed(runs.exact_micro_batches(run.recipe, run.accelerate)):
        if rows < setup.micro_batch:
            passes = run.recipe.global_batch_size // (rows * setup.ranks)
            changes.append((f"--set profile.micro_batch={rows}", {"micro_batch": rows, "accumulation": passes}))
    if setup.kept_layers:
        changes.append((f"--set profile.kept_layers={setup.kept_layers // 2}", {"kept_layers": setup.kept_layers // 2}))
        changes.append(("--set profile.kept_layers=0", {"kept_layers": 0}))
    if not setup.embedding_offload and not setup.offload and not setup.full:
        changes.append(("--set profile.embedding_offload=true", {"embedding_offload": True}))
    if not setup.activation_offload and setup.on_gpu:
        changes.append(("--set profile.activation_offload=true", {"activation_offload": True}))
    shorter = longest_sequence(setup, plan.limits)
    if 0 < shorter < setup.max_length:
        changes.append((f"--set max_length={shorter}", {"max_length": shorter}))
    return changes


def _profiles_that_fit(plan: Plan) -> list[str]:
    """Shipped profiles for the recipe that need no more GPUs, GPU memory and RAM than there are, the fastest first."""
    found = []
    for run in _runs_of(plan.run.recipe_name, plan.run.recipe):
        if run.profile_name != plan.run.profile_name and run.accelerate.num_machines == 1:
            other = make_plan(filled(run, plan.limits), plan.limits)
            if other.fits and other.setup.on_gpu == plan.setup.on_gpu:
                found.append((*_preference(other), f"--profile {profile_as_typed(other.run)}"))
    return [flags for *_, flags in sorted(found, reverse=True)]


def _preference(plan: Plan) -> tuple[bool, float]:
    """Profiles meant for cards no larger than there are come first, then the fastest.

    One that keeps weights in host RAM must be faster by more than the prediction may be off: it takes that RAM.
    """
    is_meant_for_it = (plan.run.profile.gpu_memory_gib or 0) <= plan.limits.gpu * CARD_SLACK
    tokens_per_second = plan.time.tokens_per_second if plan.time else 0.0
    return is_meant_for_it, tokens_per_second * (1 - TIME_ERROR * (plan.setup.offload or plan.setup.embedding_offload))


def _runs_of(recipe_name: str, recipe: Recipe, overrides: dict | None = None, *, any_method: bool = False):
    """The runs of a recipe with every shipped profile that is meant for it, rows and kept layers left to `plan`.

    Those that `overrides` gives are as given.
    """
    left_to_plan = dict.fromkeys(SMALLEST, AUTO)
    for name in names(PROFILES):
        if not any_method and not runs.goes_with(recipe_name, recipe, runs.load_profile(name)):
            continue
        yield _run(recipe_name, recipe, name, left_to_plan | (overrides or {}))


def _run(recipe_name: str, recipe: Recipe, profile_name: str, overrides: dict | None = None) -> Run:
    profile = runs.load_profile(profile_name, overrides).for_recipe(recipe_name)
    config = find(profile.accelerate_config, ACCELERATE_CONFIGS, "accelerate config")
    accelerate = read_accelerate_config(config)
    recipe = _with_whole_passes(recipe, profile, accelerate)
    return runs.run_of(recipe_name, recipe, profile_name, profile, accelerate, output="")


def _with_whole_passes(recipe: Recipe, profile: Profile, accelerate: AccelerateConfig) -> Recipe:
    """With the global batch rounded up to what a number of whole passes takes: memory is that of any other."""
    rows = accelerate.num_processes * (1 if profile.micro_batch == AUTO else profile.micro_batch)
    return recipe.model_copy(update={"global_batch_size": rows * math.ceil(recipe.global_batch_size / rows)})


def run_on(machine: Machine, recipe_name: str, sets: tuple[str, ...], gpu: GpuModel | None = None) -> Run:
    """A filled run on all GPUs of a machine that no profile describes, its weights on the GPUs."""
    recipe_overrides, profile_overrides = runs.parse_sets(sets)
    stem, gpus = name_of(recipe_name), len(machine.gpus)
    recipe = runs.load_recipe(recipe_name, recipe_overrides)
    values = {
        "description": "Given on the command line.", "accelerate_config": "given", "num_gpus": gpus,
        "gpu_memory_gib": machine.gpu_memory_gib, "host_memory_gib": machine.host_total_gib,
        "fits": {"any": [recipe.method]},
    }  # fmt: skip
    profile = parse(Profile, values | profile_overrides, "--set").for_recipe(stem)
    accelerate = AccelerateConfig(path="given", num_processes=gpus, mixed_precision="bf16")
    name, recipe = f"{gpus} x {machine.gpu_memory_gib:g} GiB", _with_whole_passes(recipe, profile, accelerate)
    run = runs.run_of(stem, recipe, name, profile, accelerate, output="runs")
    return filled(run, limits_here(machine), gpu)


def unlike_profile(run: Run, sets: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What `--set` needs beside `sets` to make its shipped profile that of a run which was found with them."""
    shipped = _run(run.recipe_name, run.recipe, run.profile_name, runs.parse_sets(sets)[1])
    as_shipped = filled(shipped, limits_of(shipped)).profile
    found = {key: getattr(run.profile, key) for key in SMALLEST}
    return tuple(f"profile.{key}={number}" for key, number in found.items() if number != getattr(as_shipped, key))


def profile_as_typed(run: Run, sets: tuple[str, ...] = ()) -> str:
    """Its profile's name, and the flags that make the shipped one that of a run which was found with `sets`."""
    return " --set ".join([run.profile_name, *unlike_profile(run, sets)])


def find_profile(recipe_name: str, sets: tuple[str, ...], machine: Machine, gpu: GpuModel | None = None) -> Plan:
    """The plan of the shipped profile that is fastest on `machine`, filled for it.

    Raises UsageError naming the nearest one.
    """
    overrides, profile_overrides = runs.parse_sets(sets)
    recipe = runs.load_recipe(recipe_name, overrides)
    stem = name_of(recipe_name)
    gpu, limits = gpu or machine.model, limits_here(machine)
    plans = [
        make_plan(filled(run, limits, gpu), limits, gpu)
        for run in _runs_of(stem, recipe, profile_overrides)
        if run.accelerate.num_machines == 1
    ]
    if not plans:
        raise UsageError(f"no profile for one machine is meant for recipe {stem}; see: {command()} list")
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return max(fitting, key=_preference)
    if not machine.gpus:
        raise UsageError(f"no profile of {stem} fits {_described(machine)}; {NO_GPU}")
    closest = min(plans, key=_distance)
    raise UsageError(
        f"no profile of {stem} fits {_described(machine)}; nearest: {closest.run.profile_name}, {_shortfall(closest)}"
    )


def _distance(plan: Plan) -> tuple[float, float]:
    """How far a plan is from fitting: GPUs first, then the worst share of a resource."""
    short = [verdict for verdict in plan.verdicts if not verdict.fits]
    missing = sum(verdict.needs - verdict.has for verdict in short if verdict.resource == GPU_COUNT)
    return missing, max((v.needs / max(v.has, 1e-9) for v in short if v.resource != GPU_COUNT), default=0.0)


def _described(machine: Machine) -> str:
    count = len(machine.gpus)
    gpus = f"{count} GPU{'s' * (count > 1)} with {machine.gpu_memory_gib:.1f} GiB free" if count else "no GPU"
    host = "" if math.isinf(machine.host_available_gib) else f" and {machine.host_available_gib:.1f} GiB of free RAM"
    return gpus + host


def _shortfall(plan: Plan) -> str:
    return "; ".join(str(verdict) for verdict in plan.verdicts if not verdict.fits)


def matrix(recipe_name: str, sets: tuple[str, ...]) -> list[dict]:
    """Every shipped profile against every method for a recipe's model, filled."""
    recipe = runs.load_recipe(recipe_name, runs.parse_sets(sets)[0])
    stem = name_of(recipe_name)
    rows = {}
    for method in METHODS:
        lora = None if method == "full" else recipe.lora or Lora()
        variant = recipe.model_copy(update={"method": method, "lora": lora})
        for run in _runs_of(stem, variant, any_method=True):
            name = run.profile_name
            if run.accelerate.use_cpu or (run.profile.embedding_offload and method == "full"):
                continue
            plan = make_plan(filled(run, limits_of(run)), limits_of(run))
            rows.setdefault(name, {"profile": name, "gpus": run.profile.num_gpus,
                                   "gpu_memory_gib": run.profile.gpu_memory_gib,
                                   "host_memory_gib": run.profile.host_memory_gib, "methods": {}})  # fmt: skip
            rows[name]["methods"][method] = {
                "fits": plan.fits,
                "micro_batch": plan.setup.micro_batch,
                "peak_gpu_gib": round(gpu_peak(plan.setup).total / GIB, 1),
                "peak_host_gib": round(host_peak(plan.setup) / GIB, 1),
                "short_of": [verdict.resource for verdict in plan.verdicts if not verdict.fits],
            }
    return list(rows.values())


def refusal(plan: Plan) -> str | None:
    """Why a run cannot fit, in one line that ends with what would; None if it does."""
    if plan.fits:
        return None
    instead = way_out(plan, nearest_changes(plan))
    return f"{plan.run.recipe_name} with {plan.run.profile_name} does not fit: {_shortfall(plan)}; {instead}"


def way_out(plan: Plan, changes: list[str]) -> str:
    """What to do about a plan that does not fit; `changes` are the nearest that do."""
    if all(verdict.resource.startswith("disk") for verdict in plan.verdicts if not verdict.fits):
        return "free some space, or keep run and downloads on another disk (--output, HF_HOME)"
    if not plan.limits.gpus and plan.setup.on_gpu:
        return NO_GPU
    if changes:
        return f"nearest change that fits: {'   or   '.join(changes)}"
    return "no change of one or two settings makes it fit, nor does another profile"
