"""What `plan` says in words, a label and a text each: verdicts, what a search chose, time, cost, limits, the run."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from fitune.planning import in_fp8
from fitune.planning.async_save import how_it_saves
from fitune.planning.found import Found
from fitune.planning.memory import base_on_disk
from fitune.planning.network import Way, network_lines
from fitune.planning.outlook import Outlook, way_out
from fitune.planning.plan import Plan, Time, Verdict, needed_disk
from fitune.planning.sizes import Setup
from fitune.planning.words import (
    KEEPS_GATHERED,
    copies_in_words,
    described,
    kept_in_words,
    ranks_in_words,
    rounded,
    timed,
)

GAP = 2
"Columns between the longest label and the texts."


@dataclass(frozen=True)
class Line:
    label: str
    text: str | Text
    style: str = ""


def print_lines(lines: list[Line], console: Console) -> None:
    """Texts begin in one column. On a terminal their further lines begin there too; a pipe gets one line each."""
    width = max(len(line.label) for line in lines) + GAP
    for line in lines:
        text = Text.assemble(line.text, style=line.style)
        room = console.width - width if console.is_terminal else len(text) + 1
        for place, part in enumerate(text.wrap(console, room)):
            part.rstrip()
            console.print(Text(("" if place else line.label).ljust(width)) + part)


def head_lines(
    plan: Plan, outlook: Outlook, ways: list[Way], found: Found | None, better_in_fp8: Plan | None = None
) -> list[Line]:
    """From the verdicts to the run's own settings. `found` is what a search chose."""
    lines = [_verdict(verdict) for verdict in plan.verdicts]
    if not plan.fits:
        lines.append(Line("next", way_out(plan, outlook.changes), "bold"))
    if found:
        lines += _choice(found)
    if plan.time:
        lines += _estimate(plan.time)
    if better_in_fp8:
        lines.append(Line("in fp8", in_fp8.offer(better_in_fp8, plan)))
    lines += [Line("" if place else "network", line) for place, line in enumerate(network_lines(ways))]
    lines += _limits(plan, outlook)
    return lines + list(_run(plan))


def _verdict(verdict: Verdict) -> Line:
    mark = ("fits: ", "green") if verdict.fits else ("no: ", "red")
    return Line(verdict.resource, Text.assemble(mark, verdict.in_words))


def _choice(found: Found) -> list[Line]:
    lines = [Line("chosen", f"{described(found.plan)}, {timed(found.plan)}")]
    lines += [Line("next best", found.next_best)] if found.runner_up else []
    notes = {"idle": found.why_idle(), "uneven": found.uneven}
    return lines + [Line(label, note, "magenta") for label, note in notes.items() if note]


def _estimate(time: Time) -> list[Line]:
    if not time.is_known:
        known = (
            f"'{time.gpu}' is not in the table of GPUs; give --gpu-tflops N, its dense bf16 products by the data sheet"
        )
        return [Line("estimate", f"no time: {known}")]
    speed = f"{rounded(time.parts['total'])} s a step, {rounded(time.tokens_per_second)} tokens/s on {time.gpu}"
    run = f"{time.steps:,} steps, {rounded(time.hours)} hours" if time.steps else "hours known after `prepare`"
    lines = [Line("estimate", f"{speed}; {run}")]
    if time.price_per_hour is not None:
        of_run = "total known after `prepare`" if time.cost is None else f"{time.cost:,.2f} in total"
        per_million = f"{time.cost_per_million_tokens:,.2f} per million tokens"
        lines.append(Line("cost", f"{per_million} at {time.price_per_hour:g} an hour; {of_run}"))
    return lines


def _limits(plan: Plan, outlook: Outlook) -> list[Line]:
    rows = outlook.largest_micro_batch
    if not rows:
        return []
    rows = f"{rows} row{'s' * (rows > 1)} of {plan.setup.max_length:,} tokens a pass"
    least = "no layer kept" + ", inputs in RAM" * outlook.inputs_in_ram
    least += ", one copy of the model" * (plan.setup.replicas > 1)
    one = f", or one of {outlook.longest_sequence:,}" if outlook.longest_sequence else ""
    return [Line("at most", f"{rows}{one} ({least})")]


def _run(plan: Plan) -> Iterator[Line]:
    s = plan.setup
    where = "weights in host RAM" if s.offload else "weights on the GPUs" if s.on_gpu else "weights in RAM"
    where += ", gradients and optimizer state in host RAM" * s.optimizer_offload
    yield Line(
        "model", f"{s.shape.parameters / 1e6:,.0f} M parameters, {s.trainable / 1e6:,.0f} M trained ({s.method})"
    )
    yield Line("on", f"{ranks_in_words(s)}{copies_in_words(s)}, {where}")
    kept = kept_in_words(s) + f", {KEEPS_GATHERED}" * (not s.reshard)
    fp8 = f", {in_fp8.note(plan)}" if s.fp8 else ""
    yield Line("a pass", f"{s.micro_batch} x {s.max_length:,} tokens, {kept}{fp8}")


def detail_lines(plan: Plan) -> list[Line]:
    """Of --details: disk, who reads the base, how it saves, where the time of a step goes."""
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.disk.items() if size)
    lines = [Line("disk", f"{needed_disk(plan.disk) / 1e9:.1f} GB to train: {parts}")]
    if reading := _reading(plan.setup):
        lines.append(Line("reading", reading))
    if saving := how_it_saves(plan.setup):
        lines.append(Line("saving", saving))
    if plan.time and plan.time.is_known:
        shown = {name: seconds for name, seconds in plan.time.parts.items() if name != "total" and seconds >= 0.05}
        lines.append(Line("a step", ", ".join(f"{name} {rounded(seconds)} s" for name, seconds in shown.items())))
    return lines


def _reading(s: Setup) -> str:
    """What several copies of the model on a machine ask of its disk; '' of one.

    Their ranks read the same files at about the same time, so what one has read the page cache has for the others.
    """
    copies, base = round(s.copies_a_machine), base_on_disk(s.shape) / 1e9
    if copies <= 1:
        return ""
    cached = f"each of {copies} copies reads the base: {base:.1f} GB of a disk that the page cache serves"
    return f"{cached}, {copies * base:.1f} GB of a network disk that it does not"
