"""What `plan` prints in 80 columns: nothing is cut off, and what was tried takes few lines."""

import io

from rich.console import Console

from fitune.planning.limits import given_machine
from fitune.planning.report import print_matrix, print_tried
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
    assert any(line.startswith("fsdp_offload_full_4x80gb  4 x 80 + 480  ") for line in lines)


def test_what_was_tried():
    found = find("llama3_70b_qlora", (), given_machine(4, 24, 64))
    lines = _lines(lambda console: print_tried(found, [found.plan], console))
    first = next(line for line in lines if line.startswith("weights on the GPUs "))
    assert first.split()[4:6] == ["4", "1"] and first.split()[8] == "s"
    assert any("no: GPU, " in line and " short " in line for line in lines)
    assert len(lines) <= 1 + 1 + 2 * 12 + 3  # a title and a heading each; a plan has two lines at most
