"""What `plan` prints in 80 columns: nothing is cut off, and what was tried takes few lines."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from rich.text import Text

from fitune.config.shipped import PROFILES, names
from fitune.planning.head import Line, print_lines
from fitune.planning.limits import given_machine
from fitune.planning.plan import Verdict
from fitune.planning.report import _outcome, print_matrix, print_tried
from fitune.planning.search import find
from fitune.planning.tiers import matrix


def _lines(show) -> list[str]:
    out = io.StringIO()
    show(Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    return lines


def test_all_profiles():
    lines = _lines(lambda console: print_matrix("llama3_8b_qlora", matrix("llama3_8b_qlora", ()), console))
    profiles = [line for line in lines if line.split(" x ")[0].rstrip("0123456789").strip() in names(PROFILES)]
    assert len(profiles) == len(names(PROFILES)) - 1  # a line each; the one without a GPU is not among them
    assert any(line.startswith("fsdp_offload_full_4x80gb  4 x 79 + 480  ") for line in lines)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_on_a_terminal_the_head_wraps_behind_its_labels(columns):
    out = io.StringIO()
    lines = [Line("GPU memory", Text("needs 22.7 GiB of 24.0, " * 6)), Line("on", "2 GPUs", "bold")]
    print_lines(lines, Console(file=out, width=columns, force_terminal=True, color_system=None))
    first, *more, last = out.getvalue().splitlines()
    assert first.startswith("GPU memory  needs 22.7 GiB") and last == "on          2 GPUs"
    assert more and all(line.startswith(" " * 12 + line.strip()) and len(line) <= columns for line in more)


def test_what_was_tried():
    found = find("llama3_70b_qlora", (), given_machine(4, 24, 64))
    lines = _lines(lambda console: print_tried(found, [found.plan], console))
    first = next(line for line in lines if line.startswith("weights on the GPUs "))
    assert first.split()[4:7] == ["4", "1", "1"] and first.split()[9] == "s"
    assert any("no: GPU " in line and " short " in line for line in lines)
    assert len(lines) <= 2 * (1 + 2) + 2 * 12 + 2  # titles and headings; a plan has two lines at most


def test_what_lacks_next_to_nothing_is_not_short_of_none():
    plan = find("llama3_8b_qlora", (), given_machine(1, 24, 64)).plan
    lacks = replace(plan, verdicts=[Verdict("host RAM", 128.01, 128.0)])
    assert str(_outcome(lacks)) == "no: RAM 0.1 short"
