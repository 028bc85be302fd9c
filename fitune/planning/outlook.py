"""What else would fit where a plan was made for: the nearest changes, the largest batch, the longest sequence."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from fitune.config import run as runs
from fitune.planning.compute import has_fp8
from fitune.planning.fill import filled, fits, largest
from fitune.planning.gpu_models import look_up
from fitune.planning.hardware import VISIBLE
from fitune.planning.limits import Limits, limits_of
from fitune.planning.memory import host_peak
from fitune.planning.plan import GPU_COUNT, TIME_ERROR, Plan, make_plan
from fitune.planning.presets import as_typed, preset_runs
from fitune.planning.sizes import ADAM_STATE, EIGHT_BIT_STATE, GIB, Setup

MAX_MICRO_BATCH = 1024
SEQUENCE_STEP = 64  # tokens
SHORTEST = 512
"Tokens. Shorter rows are not proposed: few examples fit into them."
CARD_SLACK = 1.1
"A card of 24 GiB may have no more than 22 free."


@dataclass(frozen=True)
class Outlook:
    """What else would fit where a plan was made for."""

    changes: list[str]
    "The nearest changes that fit, as they are typed; none where the plan itself fits."
    largest_micro_batch: int
    "With no layer kept, nor gathered weights, and one copy of the model."
    longest_sequence: int
    "Tokens, with one row a pass and as little kept."
    inputs_in_ram: bool
    "Whether one of both is so large as the layers' inputs are in host RAM."


def look_around(plan: Plan, own: Sequence[str] = ()) -> Outlook:
    """Everything that `plan` says beside the run that was asked for; `own` are files of profiles beside the shipped."""
    smallest = replace(plan.setup, kept_layers=0, kept_attention=False, reshard=True, replicas=1)
    on_gpu, in_ram = (replace(smallest, activation_offload=moved) for moved in (False, True))
    ways = [on_gpu, in_ram] if smallest.on_gpu and not plan.limits.unified else [on_gpu]
    batch = plan.run.recipe.global_batch_size
    rows = [largest_micro_batch(setup, plan.limits, batch) for setup in ways]
    lengths = [longest_sequence(setup.of_rows(1, batch), plan.limits) for setup in ways]
    return Outlook(
        [] if plan.fits else nearest_changes(plan, own),
        max(rows),
        max(lengths),
        inputs_in_ram=max(rows) > rows[0] or max(lengths) > lengths[0],
    )


def largest_micro_batch(setup: Setup, limits: Limits, batch: int) -> int:
    """Rows per pass that fit, of a global batch of so many; 0 if not even one does.

    A step's only pass may take less than one of several with fewer rows: gradients that add up may be larger.
    """
    one_pass = math.ceil(batch / setup.ranks)

    def does_fit(rows: int) -> bool:
        return fits(setup.of_rows(rows, batch), limits)

    more = largest(MAX_MICRO_BATCH - one_pass + 1, lambda more: does_fit(one_pass - 1 + more))
    return one_pass - 1 + more if more else largest(one_pass - 1, does_fit)


def longest_sequence(setup: Setup, limits: Limits) -> int:
    """max_length that fits, within the model's positions; 0 if none does."""
    most = setup.shape.max_positions // SEQUENCE_STEP

    def does_fit(steps: int) -> bool:
        return fits(replace(setup, max_length=steps * SEQUENCE_STEP), limits)

    return SEQUENCE_STEP * largest(most, does_fit)


def nearest_changes(plan: Plan, own: Sequence[str] = ()) -> list[str]:
    """The smallest changes to a run that make it fit: one setting, else two, and profiles for the same hardware."""
    changes = _settings(plan)
    found = [text for text, change in changes if fits(replace(plan.setup, **change), plan.limits)]
    if not found:
        for (text, change), (other_text, other) in combinations(changes, 2):
            if not change.keys() & other.keys() and fits(replace(plan.setup, **change | other), plan.limits):
                found.append(f"{text} {other_text}")
                break
    return [*found[:2], *_profiles_that_fit(plan, own)[:1]]


def _settings(plan: Plan) -> list[tuple[str, dict]]:
    """Changes worth trying, what costs least speed first, as they are typed and as they act."""
    setup, run = plan.setup, plan.run
    changes = []
    for rows in reversed(runs.micro_batches(run.recipe, run.accelerate)):
        if rows != setup.micro_batch:
            passes = setup.of_rows(rows, run.recipe.global_batch_size).accumulation
            changes.append((f"--set profile.micro_batch={rows}", {"micro_batch": rows, "accumulation": passes}))
    if setup.kept_attention:
        changes.append(("--set profile.kept_attention=false", {"kept_attention": False}))
    if setup.activation_offload:
        changes.append(("--set profile.activation_offload=false", {"activation_offload": False}))
    if setup.kept_layers:
        changes.append((f"--set profile.kept_layers={setup.kept_layers // 2}", {"kept_layers": setup.kept_layers // 2}))
        changes.append(("--set profile.kept_layers=0", {"kept_layers": 0}))
    for count in reversed(runs.possible_replicas(setup.ranks, setup.machines)):
        if count < setup.replicas:
            changes.append((f"--set profile.replicas={count}", {"replicas": count}))
    if not setup.embedding_offload and not setup.offload and not setup.full:
        changes.append(("--set profile.embedding_offload=true", {"embedding_offload": True}))
    if not setup.activation_offload and setup.on_gpu:
        changes.append(("--set profile.activation_offload=true", {"activation_offload": True}))
    is_searched = run.profile.accelerate_config == runs.FOUND  # which never has small states beside weights in RAM
    may_be_small = not (is_searched and setup.offload)
    if setup.full and may_be_small and not setup.small_states and setup.optimizer_state == ADAM_STATE:
        small = {"small_states": True, "optimizer_state": EIGHT_BIT_STATE}
        changes.append(("--set profile.optimizer_state=bf16_8bit", small))
        if not setup.offload:
            in_ram = "--set profile.optimizer_state=bf16_8bit --set profile.optimizer_offload=true"
            changes.append((in_ram, small | {"optimizer_offload": True}))
    if setup.small_states and not (setup.offload or setup.optimizer_offload):
        changes.append(("--set profile.optimizer_offload=true", {"optimizer_offload": True}))
    if setup.method == "lora" and not setup.fp8 and plan.time and _has_fp8(plan.time.gpu):
        changes.append(("--set profile.compute=fp8", {"fp8": True}))
    shorter = longest_sequence(setup.of_rows(1, run.recipe.global_batch_size), plan.limits)
    if SHORTEST <= shorter < setup.max_length:
        changes.append((f"--set max_length={shorter}", {"max_length": shorter}))
    return changes


def _has_fp8(card: str) -> bool:
    model = look_up(card)
    return model is not None and has_fp8(model)


def _profiles_that_fit(plan: Plan, own: Sequence[str]) -> list[str]:
    """Profiles for the recipe that need no more GPUs, GPU memory and RAM than there are, the fastest first."""
    found = []
    for run in preset_runs(plan.run.recipe_name, plan.run.recipe, own=own):
        if run.profile_name != plan.run.profile_name and run.accelerate.num_machines == 1:
            limits = plan.limits.no_more_than(limits_of(run))  # its file's, which count when it is typed
            other = make_plan(filled(run, limits), limits)
            if other.fits and other.setup.on_gpu == plan.setup.on_gpu:
                found.append((*_preference(other), f"--profile {as_typed(other.run)}"))
    return [flags for *_, flags in sorted(found, reverse=True)]


def _preference(plan: Plan) -> tuple[bool, float]:
    """Profiles meant for cards no larger than there are, or for none, come first, then the fastest.

    One that keeps weights in host RAM must be faster by more than the prediction may be off: it takes that RAM.
    """
    stated, there = plan.run.profile.gpu_memory_gib, plan.limits.gpu
    is_meant_for_it = stated is None or there is None or stated <= there * CARD_SLACK
    tokens_per_second = plan.time.tokens_per_second if plan.time else 0.0
    takes_ram = plan.setup.embedding_in_ram or plan.setup.optimizer_offload
    return is_meant_for_it, tokens_per_second * (1 - TIME_ERROR * takes_ram)


def refusal(plan: Plan) -> str | None:
    """Why a run cannot fit, in one line that ends with what would; None if it does."""
    if plan.fits:
        return None
    instead = way_out(plan, nearest_changes(plan))
    return f"{plan.run.recipe_name} with {plan.run.profile_name} does not fit: {shortfall(plan)}; {instead}"


def shortfall(plan: Plan) -> str:
    """What a plan lacks, resource by resource."""
    return "; ".join(str(verdict) for verdict in plan.verdicts if not verdict.fits)


def no_gpu() -> str:
    """What to do where no GPU is seen."""
    hidden = os.environ.get(VISIBLE)
    none = "there is no GPU here" if hidden is None else f"{VISIBLE}={hidden} shows no GPU"
    return (
        f"{none}: try tiny_qlora with --profile cpu_2proc, or `plan` for another machine, as with "
        f"--gpus 1 --gpu-memory 24 --host-memory 64"
    )


def lacks_gpus(plan: Plan) -> bool:
    """Whether it takes more GPUs than there are, which no one can force."""
    return any(verdict.resource == GPU_COUNT and not verdict.fits for verdict in plan.verdicts)


def way_out(plan: Plan, changes: list[str]) -> str:
    """What to do about a plan that does not fit; `changes` are the nearest that do."""
    if all(verdict.resource.startswith("disk") for verdict in plan.verdicts if not verdict.fits):
        return "free some space, or keep run and downloads on another disk (--output, HF_HOME)"
    if not plan.limits.gpus and plan.setup.on_gpu:
        return no_gpu()
    without = "without --profile, `train` and `plan` find what is fastest on the GPUs that are there"
    if changes:
        nearest = f"nearest change that fits: {'   or   '.join(changes)}"
        return f"{nearest}; {without}" if lacks_gpus(plan) else nearest
    if lacks_gpus(plan):
        return without
    none = "no change of one or two settings makes it fit, nor does another profile"
    if plan.limits.unified:
        return none
    roomy = replace(plan.limits, host=math.inf)
    if fits(plan.setup, roomy):
        return f"{none}; {math.ceil(host_peak(plan.setup) / GIB)} GiB of free RAM would do"
    others = _profiles_that_fit(replace(plan, limits=roomy), ())
    return f"{none}; with more RAM than {plan.limits.host:.0f} GiB {others[0]} would" if others else none
