"""How `plan` answers: the verdict, time and cost, then pictures of memory; the table of all profiles."""

import math
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fitune.planning.asking import STORED
from fitune.planning.found import Found, best_of_each_kind
from fitune.planning.head import Line, detail_lines, print_lines
from fitune.planning.memory import merge_host
from fitune.planning.plan import GPU_COUNT, GPU_MEMORY, Plan
from fitune.planning.sizes import GIB
from fitune.planning.tiers import METHODS
from fitune.planning.words import numbers, places, timed

BAR = 32  # characters
SHOWN_GIB = 0.005
"What is less would stand as 0.00."
TRIED_SHOWN = 12
NAME_WIDTH = 24
"Of a shipped profile, at most."
SHORT = {GPU_MEMORY: "GPU", "host RAM": "RAM"}
LEGEND = (
    "21 + 9     fits: GiB of each GPU + GiB of each machine's RAM",
    "21 + 9 x4  so does this, with four copies of the model over the GPUs",
    "38! + 9    does not fit: too little of what is marked with !",
    "no: full   the profile keeps weights in RAM that full training changes",
)
DETAILS_HINT = "--details: memory by phase, host RAM, disk, the parts of a step's time"


def print_plan(plan: Plan, lines: list[Line], console: Console, *, details: bool = False) -> None:
    """Whether the run fits, `lines` of how long it takes and what it costs, then a picture of the scarcest memory.

    `details` adds the phases of a step, host RAM, disk and the parts of the time.
    """
    name = f"{plan.run.recipe_name} on {plan.run.profile_name}"
    answer = Text("fits", style="bold green") if plan.fits else Text("does not fit", style="bold red")
    console.print(Text.assemble((f"{name} ", "bold"), answer))
    print_lines(lines, console)
    console.print()
    console.print(_gpu_table(plan) if plan.gpu else _host_table(plan))
    console.print()
    if details:
        _print_details(plan, console)


def print_asking(folder: str, rows: list[dict], console: Console) -> None:
    """How `generate` holds a model's folder, then all ways and what each needs."""
    chosen = next((row for row in rows if row["fits"]), None)
    answer = Text(f"asked with {chosen['way']}", style="bold green") if chosen else Text("too large", style="bold red")
    console.print(Text.assemble((f"{folder} ", "bold"), answer))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "GiB of each GPU", "GiB of RAM", "way, the fastest first"):
        table.add_column(column, justify="right" if column.startswith("GiB") else "left")
    for row in rows:
        mark = Text("fits" if row["fits"] else "no", style="green" if row["fits"] else "red")
        table.add_row(mark, f"{row['gpu_gib']:.1f}", f"{row['host_gib']:.1f}", row["way"])
    console.print(table)
    if any(STORED in row["way"] for row in rows):  # not beside an adapter that was trained beside NF4
        console.print(
            "eval takes the first way with weights as stored that fits; --load nf4 or stored chooses", style="dim"
        )


def _print_details(plan: Plan, console: Console) -> None:
    if plan.gpu:
        for table in (_phase_table(plan), _host_table(plan)):
            console.print(table)
            console.print()
    print_lines(detail_lines(plan), console)
    console.print()


def _gpu_table(plan: Plan) -> Table:
    table = _table(f"each GPU at its peak ({plan.gpu.phase})")
    limit = plan.limits.gpu or plan.gpu.total / GIB
    for name, size in sorted(plan.gpu.components.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{size / GIB:.2f}", _bar(size / GIB, limit, "cyan"))
    table.add_section()
    total = plan.gpu.total / GIB
    _add_total(table, f"all, of {limit:.1f}", total, limit)
    return table


def _add_total(table: Table, name: str, total: float, limit: float) -> None:
    style = "green" if total <= limit else "red"
    table.add_row(name, f"{total:.2f}", _bar(total, limit, style, rest=True))


def _phase_table(plan: Plan) -> Table:
    table = _table("in torch's allocator, by phase")
    most = plan.gpu.allocated
    for phase, size in plan.gpu.phases.items():
        style = "magenta" if phase == plan.gpu.phase else "cyan"
        table.add_row(phase, f"{size / GIB:.2f}", _bar(size, most, style))
    return table


def _host_table(plan: Plan) -> Table:
    s, phase = plan.setup, plan.host_phase
    each = "each machine's RAM" if s.machines > 1 else "host RAM"
    table = _table(f"{each} at its peak ({phase})")
    total = sum(plan.host[phase].values()) / GIB
    limit = total if math.isinf(plan.limits.host) else plan.limits.host
    for name, size in sorted(plan.host[phase].items(), key=lambda item: -item[1]):
        if size / GIB >= SHOWN_GIB:
            table.add_row(name, f"{size / GIB:.2f}", _bar(size / GIB, limit, "cyan"))
    table.add_section()
    others = ", ".join(f"{name} {sum(parts.values()) / GIB:.1f}" for name, parts in plan.host.items() if name != phase)
    _add_total(table, "all" if math.isinf(plan.limits.host) else f"all, of {limit:.1f}", total, limit)
    table.caption = f"other phases: {others}, merge about {merge_host(s) / GIB:.1f}"
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="italic", box=None, pad_edge=False)
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    return table


def _bar(value: float, most: float, style: str, *, rest: bool = False) -> Text:
    """A bar of BAR characters for `most`; what is beyond it ends in an arrow. `rest` shows what is left of `most`."""
    width = BAR * value / most if most else 0
    if width > BAR:
        return Text("█" * (BAR - 1) + "▶", style=style)
    bar = "█" * int(width) + ("▌" if width % 1 >= 0.5 else "")
    return Text.assemble((bar, style), ("░" * (BAR - len(bar)) * rest, "dim"))


def print_tried(found: Found, own: Sequence[Plan], console: Console) -> None:
    """The best of each kind that a search tried, and what profiles of one's own come to there."""
    best = best_of_each_kind(found)[:TRIED_SHOWN]
    _print_plans("tried, the best of each kind first", best, console, names_gpus=found.names_gpus)
    if own:
        _print_plans("profiles of your own, there", own, console, named=True)


def _print_plans(
    title: str, plans: Sequence[Plan], console: Console, *, named: bool = False, names_gpus: bool = False
) -> None:
    """One line each, `named` by its profile, its GPUs counted or by number; narrow enough for 80 columns."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("profile" if named else "")
    for column in ("GPUs", "copies", "rows", "kept", "a step", "GPU\nGiB", "RAM\nGiB"):
        table.add_column(column, justify="left" if column == "a step" else "right", no_wrap=True)
    for plan in plans:
        s, name = plan.setup, plan.run.profile_name if named else ", ".join(places(plan))
        gpu = f"{plan.gpu.total / GIB:.1f}" if plan.gpu else "-"
        ram = f"{sum(plan.host[plan.host_phase].values()) / GIB:.1f}"
        kept = f"{s.kept_layers}/{s.shape.layers}"
        gpus = numbers(plan.used_cards) if names_gpus else str(s.ranks * s.on_gpu)
        table.add_row(name, gpus, str(s.replicas), str(s.micro_batch), kept, _outcome(plan), gpu, ram)
    console.print(table)


def _outcome(plan: Plan) -> str | Text:
    """Its seconds; of what does not fit, what there is too little of."""
    if plan.fits:
        return timed(plan).removesuffix(" a step")
    worst = next(verdict for verdict in plan.verdicts if not verdict.fits)
    if worst.resource == GPU_COUNT:
        return Text(f"no: takes {worst.needs:.0f} GPUs", style="red")
    short = max(0.1, worst.needs - worst.has)  # what is smaller would be shown as none
    return Text(f"no: {SHORT.get(worst.resource, worst.resource)} {short:.1f} short", style="red")


def print_matrix(recipe: str, rows: list[dict], console: Console) -> None:
    """Every profile against every method: GiB per GPU and of RAM, and what is short where it does not fit."""
    table = Table(title=f"the model of {recipe} on every profile", title_justify="left", box=None, pad_edge=False)
    for column in ("profile", "it has", *METHODS):
        table.add_column(column, no_wrap=column == "profile", min_width=NAME_WIDTH * (column == "profile"))
    for row in rows:
        gpu, host = math.floor(row["gpu_memory_gib"]), math.floor(row["host_memory_gib"])
        has = f"{row['gpus']} x {gpu} + {host}"
        table.add_row(row["profile"], has, *(_cell(row["methods"].get(method)) for method in METHODS))
    console.print(table)
    console.print()
    for line in (*LEGEND, *_idle_lines(rows)):
        console.print(line)


def _idle_lines(rows: list[dict]) -> Iterator[str]:
    """Of each profile with more GPUs than a step has rows."""
    for row in rows:
        if idle := max(entry.get("idle_gpus", 0) for entry in row["methods"].values()):
            yield f"{row['profile']}: {idle} GPUs have nothing to do in a step of global_batch_size rows"


def _cell(entry: dict | None) -> Text:
    if entry is None:
        return Text("-")
    if "peak_gpu_gib" not in entry:
        return Text("no: full", style="red")
    of_ram = "host RAM" in entry["short_of"]
    of_gpu = bool(set(entry["short_of"]) - {"host RAM"})
    gpu, ram = _short(entry["peak_gpu_gib"]), _short(entry["peak_host_gib"])
    copies = f" x{entry['replicas']}" if entry["replicas"] > 1 else ""
    return Text(f"{gpu}{'!' * of_gpu} + {ram}{'!' * of_ram}{copies}", style="green" if entry["fits"] else "red")


def _short(gib: float) -> str:
    """Two digits, or all before the point."""
    return f"{gib:.1f}".removesuffix(".0") if gib < 10 else f"{gib:.0f}"
