"""What `fitune plan` does with its flags, and the exact numbers of `plan --json`."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from fitune.columns import columns
from fitune.config import run as runs
from fitune.config.schema import Run
from fitune.config.shipped import name_of
from fitune.errors import UsageError
from fitune.planning.asked_folder import asked_folder, is_asked_as_folder
from fitune.planning.asking import as_rows
from fitune.planning.compute import refuse_fp8_on, refuse_missing_fp8
from fitune.planning.fill import filled, resolve
from fitune.planning.found import Found
from fitune.planning.gpu_models import GpuModel, gpu_model, look_up, memory_of, refuse_several, stated_model
from fitune.planning.hardware import this_machine
from fitune.planning.head import head_lines
from fitune.planning.in_fp8 import better_in_fp8
from fitune.planning.limits import Limits, given_machine, limits_of
from fitune.planning.machine import Gpu, Machine
from fitune.planning.memory import merge_host
from fitune.planning.network import ways_to_spread
from fitune.planning.outlook import Outlook, look_around, shortfall
from fitune.planning.plan import Plan, make_plan, needed_disk
from fitune.planning.presets import own_profiles, preset_run
from fitune.planning.report import DETAILS_HINT, print_asking, print_matrix, print_plan, print_tried
from fitune.planning.search import find as find_fastest
from fitune.planning.sizes import GIB
from fitune.planning.tiers import matrix
from fitune.planning.words import described

HARDLY_MORE = 1.05
"A card of 80 GB reports 79.6 GiB."


def plan_command(
    recipe: str, profile: str | None, sets: tuple[str, ...], *, gpus: int | None, machines: int,
    gpu_memory: float | None, host_memory: float | None, gpu: str | None, gpu_tflops: float | None, find: bool,
    all_tiers: bool, in_json: bool, details: bool, profiles: Path | None, **options,
) -> None:  # fmt: skip
    """What `fitune plan` does with its flags."""
    _refuse_combinations(profile, gpus, machines, gpu, gpu_memory, host_memory, find, all_tiers)
    console = Console(soft_wrap=True, highlight=False, width=columns())
    if is_asked_as_folder(recipe):
        of_runs = {"--profile": profile, "--set": sets, "--find": find, "--all": all_tiers, "--details": details}
        of_runs |= {"--gpu-tflops": gpu_tflops, "--machines": machines > 1, "--profiles": profiles, **_told(options)}
        _refuse_given(of_runs, f"{recipe} is a model's folder, or an adapter's")
        machine = _given_machine(gpus, gpu_memory, host_memory, gpu) or this_machine()
        _plan_asking(recipe, machine, console, in_json=in_json)
        return
    own = own_profiles(recipe, profiles)
    if all_tiers:
        one_plans = {"--details": details, "--gpu": gpu, "--gpu-tflops": gpu_tflops, **_told(options)}
        _refuse_given(one_plans, "--all shows every shipped profile on its own hardware")
        rows = matrix(recipe, sets, own)
        print(json.dumps(rows, indent=2)) if in_json else print_matrix(recipe, rows, console)
        return
    runs.check_paths(recipe, sets, "base.model")
    if profile:
        planned = partial(_with_profile, recipe, profile, _named_model(gpu, gpu_tflops, gpu_memory), options)
    else:
        machine = _given_machine(gpus, gpu_memory, host_memory, gpu) or this_machine()
        named = _named_model(gpu, gpu_tflops, machine.gpu_memory_gib)
        planned = partial(_searched, recipe, machine, machines, named, options)
    plan, model, found = planned(sets)
    in_fp8 = better_in_fp8(plan, profile, sets, lambda changed: planned(changed)[0])
    on_own_profiles = plans_with(own, recipe, sets, plan.limits, model, **options) if found else []
    outlook = look_around(plan, own)
    ways = ways_to_spread(plan, lambda changed: planned((*sets, *changed))[0])
    if in_json:
        more = {"network": [way.as_json() for way in ways]}
        more |= search_as_json(found) | {"own_profiles": own_as_json(on_own_profiles)} if found else {}
        more |= {"in_fp8": {"choice": described(in_fp8)} | _outcome(in_fp8)} if in_fp8 else {}
        print(json.dumps(as_json(plan, outlook) | more, indent=2))
        return
    print_plan(plan, head_lines(plan, outlook, ways, found, in_fp8), console, details=details)
    if found and find:
        print_tried(found, on_own_profiles, console)
        console.print()
    if not details:
        console.print(DETAILS_HINT, style="dim")


def _with_profile(
    recipe: str, profile: str, named: GpuModel | None, options: dict, sets: tuple[str, ...]
) -> tuple[Plan, GpuModel | None, None]:
    """The plan on the hardware that a profile states, and the model of --gpu."""
    run = resolve(recipe, profile, sets, gpu=named, network=options["network"])
    refuse_missing_fp8(run, named)
    _refuse_a_smaller_card(run, named)
    return make_plan(run, limits_of(run), named, **options), named, None


def _searched(
    recipe: str, machine: Machine, machines: int, named: GpuModel | None, options: dict, sets: tuple[str, ...]
) -> tuple[Plan, GpuModel | None, Found]:
    """The fastest plan on `machine`, the model whose speed counts, and what the search came to."""
    if named and runs.parse_sets(sets)[1].get("compute") == "fp8":
        refuse_fp8_on(named)
    found = find_fastest(recipe, sets, machine, named, machines=machines, network=options["network"])
    chosen = replace(machine, gpus=found.plan.cards)
    model = named or chosen.model
    refuse_missing_fp8(found.plan.run, named or chosen.known_model, chosen.card_gib)
    return make_plan(found.plan.run, found.plan.limits, model, **options), model, found


def _refuse_given(flags: dict, why: str) -> None:
    """UsageError for those that were given, by their values."""
    if given := [flag for flag, value in flags.items() if value]:
        raise UsageError(f"{why}: leave out {', '.join(given)}")


def _told(options: dict) -> dict:
    """The flags of what a plan tells beside memory and time."""
    return {"--price-per-hour": options["price"], "--network": options["network"]}


def _refuse_a_smaller_card(run: Run, named: GpuModel | None) -> None:
    """Raises UsageError where --gpu names a card with less memory than the profile states."""
    stated = run.profile.gpu_memory_gib or 0
    if named and not named.source.startswith("stated") and stated > HARDLY_MORE * max(named.memory_gib):
        most = f"{max(named.memory_gib):g}"
        raise UsageError(
            f"--gpu {named.name} has {most} GiB, profile {run.profile_name} states {stated:g}: leave out --profile, or "
            f"add --set profile.gpu_memory_gib={most}"
        )


def _plan_asking(folder: str, machine: Machine, console: Console, *, in_json: bool) -> None:
    rows = as_rows(asked_folder(Path(folder)), machine)
    print(json.dumps({"model": folder, "asking": rows}, indent=2)) if in_json else print_asking(folder, rows, console)


def _given_machine(
    gpus: int | None, gpu_memory: float | None, host_memory: float | None, gpu: str | None
) -> Machine | None:
    """The one that the flags describe, None without them. A GPU's name alone says how much memory it has."""
    if gpus is None and gpu is None:
        return None
    if gpu and gpu_memory is None:
        gpu_memory = memory_of(gpu)
    model = look_up(gpu) if gpu else None
    return given_machine(
        1 if gpus is None else gpus, gpu_memory, host_memory, unified=model is not None and model.unified
    )


def _named_model(gpu: str | None, tflops: float | None, memory_gib: float | None) -> GpuModel | None:
    """The GPU of --gpu and --gpu-tflops; None where neither is given. Raises UsageError if it lacks bf16."""
    if tflops:
        return stated_model(gpu, memory_gib or 0, tflops)
    model = gpu_model(gpu) if gpu else None
    if model and not model.has_bf16:
        Machine((Gpu(gpu, 0, 0),), 0, 0).refuse_missing_bf16()
    return model


def as_json(plan: Plan, outlook: Outlook) -> dict:
    """The exact numbers of `plan --json`, GiB unless the key says otherwise."""

    def gib(sizes: dict[str, float]) -> dict[str, float]:
        return {name: round(size / GIB, 3) for name, size in sizes.items() if size}

    peak, time = plan.gpu, plan.time
    return {
        "recipe": plan.run.recipe_name, "profile": plan.run.profile_name, "method": plan.setup.method,
        "gpus": plan.setup.ranks if plan.setup.on_gpu else 0, "machines": plan.setup.machines, "fits": plan.fits,
        "peak_gpu_gib": round(peak.total / GIB, 3) if peak else 0.0,
        "peak_allocated_gib": round(peak.allocated / GIB, 3) if peak else 0.0,
        "peak_phase": peak.phase if peak else plan.host_phase,
        "peak_host_gib": round(sum(plan.host[plan.host_phase].values()) / GIB, 3),
        "disk_gib": round(needed_disk(plan.disk) / GIB, 3),
        "micro_batch": plan.setup.micro_batch, "kept_layers": plan.setup.kept_layers,
        "kept_attention": plan.setup.kept_attention, "activation_offload": plan.setup.activation_offload,
        "reshard_after_forward": plan.setup.reshard, "replicas": plan.setup.replicas,
        "max_length": plan.setup.max_length, "compute": plan.run.profile.compute,
        "largest_micro_batch": outlook.largest_micro_batch, "longest_sequence": outlook.longest_sequence,
        "components": gib(peak.components) if peak else {}, "phases": gib(peak.phases) if peak else {},
        "host": {phase: gib(parts) for phase, parts in plan.host.items()}, "disk": gib(plan.disk),
        "merge_host_gib": round(merge_host(plan.setup) / GIB, 3),
        "verdicts": [{"resource": v.resource, "needs": round(v.needs, 3), "fits": v.fits,
                      "has": None if math.isinf(v.has) else round(v.has, 3)} for v in plan.verdicts],
        "changes": outlook.changes,
        "estimate": None if time is None or not time.is_known else {
            "gpu": time.gpu, "step_seconds": round(time.parts["total"], 3),
            "tokens_per_second": round(time.tokens_per_second, 1), "steps": time.steps, "hours": time.hours,
            "cost": time.cost, "cost_per_million_tokens": time.cost_per_million_tokens},
    }  # fmt: skip


def _refuse_combinations(profile, gpus, machines, gpu, gpu_memory, host_memory, find, all_tiers) -> None:
    refuse_several(gpu or "")
    given = gpus is not None or gpu_memory is not None or host_memory is not None or machines > 1
    if profile and (given or find or all_tiers):
        raise UsageError(
            "--profile names the hardware: leave out --gpus, --machines, --gpu-memory, --host-memory, --find, --all"
        )
    if all_tiers and (given or find):
        raise UsageError("--all shows every shipped profile on its own hardware: leave out the other flags")
    if given and gpus is None and gpu is None and (machines == 1 or gpu_memory or host_memory):
        raise UsageError("--gpu-memory and --host-memory describe hardware together with --gpus N or --gpu MODEL")


def plans_with(
    own: Sequence[str], recipe_name: str, sets: tuple[str, ...], limits: Limits, gpu: GpuModel | None, **options
) -> list[Plan]:
    """The recipe with each profile of one's own that is meant for it, on the hardware that a search was for."""
    recipe_overrides, profile_overrides = runs.parse_sets(sets)
    recipe, plans = runs.load_recipe(recipe_name, recipe_overrides), []
    for name in own:
        if runs.goes_with(recipe, runs.load_profile(name)):
            run = preset_run(name_of(recipe_name), recipe, name, profile_overrides)
            run = filled(run, limits, gpu, options.get("network"))
            plans.append(make_plan(run, limits, gpu, **options))
    return plans


def own_as_json(plans: list[Plan]) -> list[dict]:
    """What a search adds about profiles of one's own."""
    return [{"profile": plan.run.profile_name} | _outcome(plan) for plan in plans]


def search_as_json(found: Found) -> dict:
    """What a search adds to `plan --json`."""
    return {
        "gpus_there": found.gpus, "gpus_idle": found.idle, "why_idle": found.why_idle(),
        "gpu_ids": found.plan.run.accelerate.gpu_ids,
        "tried": [{"choice": described(plan)} | _outcome(plan) for plan in found.tried],
    }  # fmt: skip


def _outcome(plan: Plan) -> dict:
    seconds = round(plan.time.parts["total"], 3) if plan.time and plan.time.is_known else None
    return {
        "fits": plan.fits, "why_not": shortfall(plan) or None, "step_seconds": seconds, "replicas": plan.setup.replicas,
    }  # fmt: skip
