"""How `plan` answers: tables with bars, a verdict per resource, the estimate, the matrix of tiers, or JSON."""

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fitune.planning.memory import merge_host
from fitune.planning.outlook import Outlook, shortfall, way_out
from fitune.planning.plan import GPU_MEMORY, Plan, needed_disk
from fitune.planning.search import Found, best_of_each_kind, described, rounded, timed
from fitune.planning.sizes import GIB
from fitune.planning.tiers import METHODS

BAR = 32  # characters
TRIED_SHOWN = 12
FP8_NOTE = ", products in fp8 (memory and time not measured yet)"


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
    if not time.is_known:
        console.print(
            f"no estimate of the time: '{time.gpu}' is not in the table of GPUs; give --gpu-tflops N, its dense bf16 "
            f"products by the data sheet"
        )
        return
    shown = {name: seconds for name, seconds in time.parts.items() if name != "total" and seconds >= 0.05}
    parts = ", ".join(f"{name} {rounded(seconds)}" for name, seconds in shown.items())
    steps = f"{time.steps:,} steps" if time.steps else "steps not known before `prepare`"
    hours = "" if time.hours is None else f", {rounded(time.hours)} hours"
    cost = "" if time.cost is None else f", {time.cost:,.2f} at {time.price_per_hour:g} an hour"
    console.print(
        f"estimate on {time.gpu}: {rounded(time.parts['total'])} s a step ({parts}), "
        f"{rounded(time.tokens_per_second)} tokens/s, {steps}{hours}{cost}"
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


def print_found(found: Found, console: Console) -> None:
    """What a search chose, what it leaves idle, and the best of each kind that it tried."""
    console.print(Text(found.in_one_line(), style="bold"))
    if why_idle := found.why_idle():
        console.print(Text(why_idle, style="yellow"))
    table = Table(title="tried, the best of each kind first", title_justify="left", box=None, pad_edge=False)
    for column in ("", "a step", "GiB per GPU", "GiB of RAM"):
        table.add_column(column, justify="left" if not column else "right")
    for plan in best_of_each_kind(found)[:TRIED_SHOWN]:
        outcome = timed(plan) if plan.fits else Text(f"no: {shortfall(plan)}", style="red")
        gpu = f"{plan.gpu.total / GIB:.1f}" if plan.gpu else "-"
        table.add_row(described(plan), outcome, gpu, f"{sum(plan.host[plan.host_phase].values()) / GIB:.1f}")
    console.print(table)
    console.print()


def print_matrix(recipe: str, rows: list[dict], console: Console) -> None:
    """Every profile against every method: GiB per GPU and of RAM, green where it fits, else what is short."""
    table = Table(
        title=f"{recipe}'s model: GiB per GPU + GiB of RAM per machine; no: what is short",
        title_justify="left",
        box=None,
    )
    for column in ("profile", "GPUs + RAM", *METHODS):
        table.add_column(column, no_wrap=True)
    for row in rows:
        has = f"{row['gpus']} x {row['gpu_memory_gib']:g} + {row['host_memory_gib']:g}"
        table.add_row(row["profile"], has, *(_cell(row["methods"].get(method)) for method in METHODS))
    console.print(table)


def _cell(entry: dict | None) -> Text:
    if entry is None:
        return Text("-")
    if "peak_gpu_gib" not in entry:
        return Text("no: frozen bases only", style="red")
    text = f"{entry['peak_gpu_gib']:.1f} + {entry['peak_host_gib']:.1f}"
    idle = f", {entry['idle_gpus']} idle" if entry["idle_gpus"] else ""
    if entry["fits"]:
        return Text(f"{text} fits{idle}", style="bold green")
    short = ", ".join({GPU_MEMORY: "GPU", "host RAM": "RAM"}.get(name, name) for name in entry["short_of"])
    return Text(f"{text} no: {short}", style="red")
