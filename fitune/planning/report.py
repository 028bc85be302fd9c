"""How `plan` answers: the verdict, time and cost, then pictures of memory; the table of all profiles."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fitune.planning.asking import STORED
from fitune.planning.async_save import how_it_saves
from fitune.planning.memory import merge_host
from fitune.planning.outlook import Outlook, way_out
from fitune.planning.plan import GPU_COUNT, GPU_MEMORY, Plan, Time, needed_disk
from fitune.planning.search import Found, best_of_each_kind
from fitune.planning.sizes import GIB
from fitune.planning.tiers import METHODS
from fitune.planning.words import places, rounded, timed

BAR = 32  # characters
TRIED_SHOWN = 12
NAME_WIDTH = 24
"Of a shipped profile, at most: where a line is short the other cells take two."
SHORT = {GPU_MEMORY: "GPU", "host RAM": "RAM"}
LEGEND = (
    "21 + 9   fits: GiB of each GPU + GiB of each machine's RAM, rounded;\n"
    "         what a profile has is written likewise\n"
    "no: GPU  does not fit: what there is too little of\n"
    "no: full the profile keeps weights in RAM that full training changes:\n"
    "         it is for lora and qlora\n"
    "idle 8   so many GPUs have nothing to do in a step of global_batch_size rows"
)
DETAILS_HINT = "--details: memory by phase, host RAM, disk, the parts of a step's time"
FP8_NOTE = ", products in fp8 (memory and time not measured yet)"


def print_plan(
    plan: Plan, outlook: Outlook, console: Console, *, details: bool = False, network: Sequence[str] = ()
) -> None:
    """Whether the run fits, how long it takes and what it costs, then a picture of the scarcest memory.

    `details` adds the phases of a step, host RAM, disk and the parts of the time; `network` is what several machines'
    network costs.
    """
    _print_verdict(plan, outlook, console)
    if plan.time:
        _print_estimate(plan, console)
    for line in network:
        console.print(line)
    _print_limits(plan, outlook, console)
    _print_choices(plan, console)
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
    console.print(_disk_line(plan))
    if saving := how_it_saves(plan.setup):
        console.print(saving)
    if plan.time and plan.time.is_known:
        console.print(_time_line(plan.time))


def _print_verdict(plan: Plan, outlook: Outlook, console: Console) -> None:
    name = f"{plan.run.recipe_name} on {plan.run.profile_name}"
    answer = Text("fits", style="bold green") if plan.fits else Text("does not fit", style="bold red")
    console.print(Text.assemble((f"{name} ", "bold"), answer))
    for verdict in plan.verdicts:
        mark = ("fits ", "green") if verdict.fits else ("no   ", "red")
        console.print(Text.assemble(mark, str(verdict)))
    if not plan.fits:
        console.print(Text(way_out(plan, outlook.changes), style="bold"))


def _print_estimate(plan: Plan, console: Console) -> None:
    time = plan.time
    if not time.is_known:
        console.print(
            f"no estimate of the time: '{time.gpu}' is not in the table of GPUs; give --gpu-tflops N, its dense bf16 "
            f"products by the data sheet"
        )
        return
    run = "steps known after `prepare`"
    if time.steps:
        run = f"{time.steps:,} steps, {rounded(time.hours)} hours"
    console.print(
        f"estimate on {time.gpu}: {rounded(time.parts['total'])} s a step, "
        f"{rounded(time.tokens_per_second)} tokens/s; {run}"
    )
    if time.price_per_hour is not None:
        of_run = "the run's known after `prepare`" if time.cost is None else f"{time.cost:,.2f} for the run"
        per_million = f"{time.cost_per_million_tokens:,.2f} per million tokens"
        console.print(f"cost at {time.price_per_hour:g} an hour: {per_million}, {of_run}")


def _print_limits(plan: Plan, outlook: Outlook, console: Console) -> None:
    if rows := outlook.largest_micro_batch:
        console.print(
            f"largest micro batch: {rows} row{'s' * (rows > 1)}; "
            f"longest sequence: {outlook.longest_sequence:,} tokens (no layer kept)"
        )


def _print_choices(plan: Plan, console: Console) -> None:
    s = plan.setup
    ranks = f"{s.ranks} GPU{'s' * (s.ranks > 1)}" if s.on_gpu else f"{s.ranks} CPU processes"
    where = "weights in host RAM" if s.offload else "weights on the GPUs" if s.on_gpu else "weights in RAM"
    where += ", gradients and optimizer state in host RAM" * s.optimizer_offload
    parameters = f"{s.shape.parameters / 1e6:,.0f} M parameters, {s.trainable / 1e6:,.0f} M trained"
    console.print(f"{s.method}, {parameters}; {ranks}, {where}")
    console.print(
        f"{s.micro_batch} x {s.max_length:,} tokens a pass, {s.kept_layers} of {s.shape.layers} layers kept"
        f"{FP8_NOTE * s.fp8}"
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
        style = "magenta" if phase == plan.gpu.phase else "cyan"
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


def _time_line(time: Time) -> str:
    shown = {name: seconds for name, seconds in time.parts.items() if name != "total" and seconds >= 0.05}
    return f"seconds of a step: {', '.join(f'{name} {rounded(seconds)}' for name, seconds in shown.items())}"


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


def print_choice(found: Found, uneven: str | None, console: Console) -> None:
    """What a search chose, what it leaves idle, and what `uneven` GPUs come to in part."""
    console.print(found.in_one_line())
    for line in filter(None, (found.why_idle(), uneven)):
        console.print(Text(line, style="magenta"))


def print_tried(found: Found, own: Sequence[Plan], console: Console) -> None:
    """The best of each kind that a search tried, and what profiles of one's own come to there."""
    _print_plans("tried, the best of each kind first", best_of_each_kind(found)[:TRIED_SHOWN], console)
    if own:
        _print_plans("profiles of your own, there", own, console, named=True)


def _print_plans(title: str, plans: Sequence[Plan], console: Console, *, named: bool = False) -> None:
    """One line each, `named` by its profile; narrow enough for 80 columns."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("profile" if named else "")
    for column in ("GPUs", "rows", "kept", "a step", "GPU GiB", "RAM GiB"):
        table.add_column(column, justify="left" if column == "a step" else "right", no_wrap=True)
    for plan in plans:
        s, name = plan.setup, plan.run.profile_name if named else ", ".join(places(plan))
        gpu = f"{plan.gpu.total / GIB:.1f}" if plan.gpu else "-"
        ram = f"{sum(plan.host[plan.host_phase].values()) / GIB:.1f}"
        kept = f"{s.kept_layers}/{s.shape.layers}"
        table.add_row(name, str(s.ranks * s.on_gpu), str(s.micro_batch), kept, _outcome(plan), gpu, ram)
    console.print(table)


def _outcome(plan: Plan) -> str | Text:
    """Its seconds; of what does not fit, what there is too little of."""
    if plan.fits:
        return timed(plan).removesuffix(" a step")
    worst = next(verdict for verdict in plan.verdicts if not verdict.fits)
    if worst.resource == GPU_COUNT:
        return Text(f"no: takes {worst.needs:.0f} GPUs", style="red")
    return Text(f"no: {SHORT.get(worst.resource, worst.resource)}, {worst.needs - worst.has:.1f} short", style="red")


def print_matrix(recipe: str, rows: list[dict], console: Console) -> None:
    """Every profile against every method: GiB per GPU and of RAM, and what is short where it does not fit."""
    table = Table(title=f"the model of {recipe} on every profile", title_justify="left", box=None, pad_edge=False)
    for column in ("profile", "it has", *METHODS):
        table.add_column(column, no_wrap=column == "profile", min_width=NAME_WIDTH * (column == "profile"))
    for row in rows:
        has = f"{row['gpus']} x {_short(row['gpu_memory_gib'])} + {_short(row['host_memory_gib'])}"
        table.add_row(row["profile"], has, *(_cell(row["methods"].get(method)) for method in METHODS))
    console.print(table)
    console.print()
    console.print(LEGEND)


def _cell(entry: dict | None) -> Text:
    if entry is None:
        return Text("-")
    if "peak_gpu_gib" not in entry:
        return Text("no: full", style="red")
    text = f"{_short(entry['peak_gpu_gib'])} + {_short(entry['peak_host_gib'])}"
    if entry["fits"]:
        return Text(f"{text}{', idle ' * bool(entry['idle_gpus'])}{entry['idle_gpus'] or ''}", style="green")
    short = ", ".join(SHORT.get(name, name) for name in entry["short_of"])
    return Text(f"{text} no: {short}", style="red")


def _short(gib: float) -> str:
    """Two digits, or all before the point."""
    return f"{gib:.1f}".removesuffix(".0") if gib < 10 else f"{gib:.0f}"
