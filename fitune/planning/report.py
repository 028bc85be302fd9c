"""How `plan` answers: tables with bars, a verdict per resource, the estimate, the matrix of tiers, or JSON."""

import json
import math
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fitune.config import run as runs
from fitune.errors import UsageError
from fitune.planning.compute import refuse_missing_fp8
from fitune.planning.fill import resolve
from fitune.planning.hardware import gpu_model, this_machine
from fitune.planning.limits import given_machine, limits_here, limits_of
from fitune.planning.memory import merge_host
from fitune.planning.plan import Plan, make_plan, needed_disk
from fitune.planning.search import METHODS, Outlook, find_profile, look_around, matrix, run_on, unlike_profile, way_out
from fitune.planning.sizes import GIB

BAR = 32  # characters
FP8_NOTE = ", products in fp8 (memory and time not measured yet)"


def plan_command(
    recipe: str, profile: str | None, sets: tuple[str, ...], *, gpus: int | None, gpu_memory: float | None,
    host_memory: float | None, gpu: str | None, find: bool, all_tiers: bool, in_json: bool, **options,
) -> None:  # fmt: skip
    """What `fitune plan` does with its flags."""
    _refuse_combinations(profile, gpus, gpu_memory, host_memory, find, all_tiers)
    console = Console(soft_wrap=True) if sys.stdout.isatty() else Console(soft_wrap=True, width=120)
    if all_tiers:
        rows = matrix(recipe, sets)
        return print(json.dumps(rows, indent=2)) if in_json else print_matrix(recipe, rows, console)
    runs.check_paths(recipe, sets, "base.model")
    model = gpu_model(gpu) if gpu else None
    if profile:
        run = resolve(recipe, profile, sets, gpu=model)
        refuse_missing_fp8(run, model)
        plan = make_plan(run, limits_of(run), model, **options)
    else:
        machine = this_machine() if gpus is None else given_machine(gpus, gpu_memory, host_memory)
        named = model or machine.known_model
        model = model or machine.model
        find = find or gpus is None
        run = find_profile(recipe, sets, machine, model).run if find else run_on(machine, recipe, sets, model)
        refuse_missing_fp8(run, named)
        plan = make_plan(run, limits_here(machine), model, **options)
        if find and not in_json and (changes := unlike_profile(run, sets)):
            console.print(f"{run.profile_name} fits with --set {' --set '.join(changes)}:")
    outlook = look_around(plan)
    return print(json.dumps(as_json(plan, outlook), indent=2)) if in_json else print_plan(plan, outlook, console)


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
        "max_length": plan.setup.max_length, "compute": plan.run.profile.compute,
        "largest_micro_batch": outlook.largest_micro_batch, "longest_sequence": outlook.longest_sequence,
        "components": gib(peak.components) if peak else {}, "phases": gib(peak.phases) if peak else {},
        "host": {phase: gib(parts) for phase, parts in plan.host.items()}, "disk": gib(plan.disk),
        "merge_host_gib": round(merge_host(plan.setup) / GIB, 3),
        "verdicts": [{"resource": v.resource, "needs": round(v.needs, 3), "fits": v.fits,
                      "has": None if math.isinf(v.has) else round(v.has, 3)} for v in plan.verdicts],
        "changes": outlook.changes,
        "estimate": None if time is None else {
            "gpu": time.gpu, "step_seconds": round(time.parts["total"], 3),
            "tokens_per_second": round(time.tokens_per_second, 1), "steps": time.steps, "hours": time.hours,
            "cost": time.cost},
    }  # fmt: skip


def _refuse_combinations(profile, gpus, gpu_memory, host_memory, find, all_tiers) -> None:
    given = gpus is not None or gpu_memory is not None or host_memory is not None
    if profile and (given or find or all_tiers):
        raise UsageError("--profile names the hardware: leave out --gpus, --gpu-memory, --host-memory, --find, --all")
    if all_tiers and (given or find):
        raise UsageError("--all shows every shipped profile on its own hardware: leave out the other flags")
    if given and gpus is None:
        raise UsageError("--gpu-memory and --host-memory describe hardware together with --gpus N")


def print_plan(plan: Plan, outlook: Outlook, console: Console) -> None:
    """Where the bytes go, whether they fit, the largest batch, the time."""
    console.print(_headline(plan))
    if plan.gpu:
        console.print(_gpu_table(plan))
        console.print(_phase_table(plan))
    console.print(_host_table(plan))
    console.print(_disk_line(plan))
    console.print()
    _print_verdicts(plan, outlook, console)
    _print_limits(plan, outlook, console)
    if plan.time:
        _print_estimate(plan, console)


def _headline(plan: Plan) -> Text:
    s = plan.setup
    ranks = f"{s.ranks} GPU{'s' * (s.ranks > 1)}" if s.on_gpu else f"{s.ranks} CPU processes"
    where = "weights in host RAM" if s.offload else "weights on the GPUs" if s.on_gpu else "weights in RAM"
    return Text(
        f"{plan.run.recipe_name} on {plan.run.profile_name}: {s.method}, {s.shape.parameters / 1e6:,.0f} M parameters, "
        f"{s.trainable / 1e6:,.0f} M trained; {ranks}, {where}; {s.micro_batch} x {s.max_length:,} tokens a pass, "
        f"{s.kept_layers} of {s.shape.layers} layers kept{FP8_NOTE * s.fp8}",
        style="bold",
    )


def _gpu_table(plan: Plan) -> Table:
    table = _table(f"each GPU at its peak ({plan.gpu.phase})")
    limit = plan.limits.gpu or plan.gpu.total / GIB
    for name, size in sorted(plan.gpu.components.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{size / GIB:.2f}", _bar(size / GIB, limit, "cyan"))
    table.add_section()
    total = plan.gpu.total / GIB
    table.add_row(f"all, of {limit:.1f}", f"{total:.2f}", _bar(total, limit, "green" if total <= limit else "red"))
    return table


def _phase_table(plan: Plan) -> Table:
    table = _table("in torch's allocator, by phase")
    most = plan.gpu.allocated
    for phase, size in plan.gpu.phases.items():
        style = "yellow" if phase == plan.gpu.phase else "blue"
        table.add_row(phase, f"{size / GIB:.2f}", _bar(size, most, style))
    return table


def _host_table(plan: Plan) -> Table:
    s, phase = plan.setup, plan.host_phase
    each = "each machine's RAM" if s.machines > 1 else "host RAM"
    table = _table(f"{each} at its peak ({phase})")
    total = sum(plan.host[phase].values()) / GIB
    limit = total if math.isinf(plan.limits.host) else plan.limits.host
    for name, size in plan.host[phase].items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}", _bar(size / GIB, limit, "cyan"))
    table.add_section()
    others = ", ".join(f"{name} {sum(parts.values()) / GIB:.1f}" for name, parts in plan.host.items() if name != phase)
    table.add_row("all", f"{total:.2f}", _bar(total, limit, "green" if total <= limit else "red"))
    table.caption = f"other phases: {others}, merge about {merge_host(s) / GIB:.1f}"
    return table


def _disk_line(plan: Plan) -> str:
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.disk.items() if size)
    return f"disk, GB: {needed_disk(plan.disk) / 1e9:.1f} to train ({parts})"


def _print_verdicts(plan: Plan, outlook: Outlook, console: Console) -> None:
    for verdict in plan.verdicts:
        mark = Text("fits " if verdict.fits else "no   ", style="bold green" if verdict.fits else "bold red")
        console.print(mark + Text(str(verdict)))
    if not plan.fits:
        console.print(Text(way_out(plan, outlook.changes), style="bold"))


def _print_limits(plan: Plan, outlook: Outlook, console: Console) -> None:
    if not outlook.largest_micro_batch:
        return
    console.print(
        f"largest micro batch: {outlook.largest_micro_batch} x {plan.setup.max_length:,} tokens; "
        f"longest sequence: {outlook.longest_sequence:,} tokens, one row a pass (no layer kept)"
    )


def _print_estimate(plan: Plan, console: Console) -> None:
    time = plan.time
    parts = ", ".join(f"{name} {value:.1f}" for name, value in time.parts.items() if name != "total" and value >= 0.05)
    steps = f"{time.steps:,} steps" if time.steps else "steps not known before `prepare`"
    hours = "" if time.hours is None else f", {time.hours:.1f} hours"
    cost = "" if time.cost is None else f", {time.cost:,.2f} at {time.price_per_hour:g} an hour"
    console.print(
        f"estimate on {time.gpu}: {time.parts['total']:.1f} s a step ({parts}), "
        f"{time.tokens_per_second:,.0f} tokens/s, {steps}{hours}{cost}"
    )


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="italic", box=None, pad_edge=False)
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    return table


def _bar(value: float, most: float, style: str) -> Text:
    """A bar of BAR characters for `most`; what is beyond it ends in an arrow."""
    width = BAR * value / most if most else 0
    if width > BAR:
        return Text("█" * (BAR - 1) + "▶", style=style)
    return Text("█" * int(width) + ("▌" if width % 1 >= 0.5 else ""), style=style)


def print_matrix(recipe: str, rows: list[dict], console: Console) -> None:
    """Every profile against every method: GiB per GPU and of RAM, green where it fits."""
    table = Table(title=f"{recipe}'s model: GiB per GPU + GiB of RAM per machine", title_justify="left", box=None)
    for column in ("profile", "GPUs + RAM", *METHODS):
        table.add_column(column, no_wrap=True)
    for row in rows:
        has = f"{row['gpus']} x {row['gpu_memory_gib']:g} + {row['host_memory_gib']:g}"
        table.add_row(row["profile"], has, *(_cell(row["methods"].get(method)) for method in METHODS))
    console.print(table)


def _cell(entry: dict | None) -> Text:
    if entry is None:
        return Text("-")
    text = f"{entry['peak_gpu_gib']:.0f} + {entry['peak_host_gib']:.0f}"
    return Text(f"{text} fits", style="bold green") if entry["fits"] else Text(text, style="red")
