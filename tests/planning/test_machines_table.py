"""docs/machines.md's table is what the search finds, and no card stays idle in it that would be of use."""

from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.machines import GPUS, MEMORIES, METHODS, MODELS, cell, host_gib
from fitune.planning.found import NO_GAIN
from fitune.planning.limits import given_machine
from fitune.planning.plan import TIME_ERROR
from fitune.planning.search import find
from fitune.planning.words import places

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line.strip("| \n").split(" | ") for line in (ROOT / "docs/machines.md").open(encoding="utf-8")]
CELLS = {tuple(row[:3]): row[3:] for row in ROWS if len(row) == 3 + len(GPUS) and row[0] in ("8B", "70B")}


@pytest.mark.parametrize("gib", MEMORIES)
@pytest.mark.parametrize("model", MODELS)
def test_every_cell_of_the_table_is_what_is_found(model, gib):
    """`python benchmarks/machines.py` writes them."""
    for method in METHODS:
        shown = CELLS[model.upper(), method, str(gib)]
        assert shown == [cell(f"llama3_{model}_{method}", count, gib) for count in GPUS], method


def test_more_cards_are_slower_only_where_ram_must_gain_more():
    """What takes RAM must be faster by what its prediction may be off: with more cards it may not be needed."""
    slower = {}
    for key, cells in CELLS.items():
        speeds = [float(text.split(" ")[0].replace(",", "")) for text in cells if text != "-"]
        worst = max(fewer / more for fewer, more in pairwise(speeds)) if speeds else 0.0
        if worst > 1:
            slower[key] = worst
    assert slower.keys() == {("70B", "lora", "48")}, "the page names them"
    assert max(slower.values()) < 1 + TIME_ERROR


def test_a_card_stays_idle_only_where_it_is_of_no_use():
    idle = [(key, GPUS[n]) for key, cells in CELLS.items() for n, text in enumerate(cells) if f" of {GPUS[n]}" in text]
    assert idle and {count for _, count in idle} == {5}
    for (model, method, gib), count in idle:
        found = find(
            f"llama3_{model.lower()}_{method}", (), given_machine(count, float(gib), host_gib(count, float(gib)))
        )
        all_used = [plan for plan in found.tried if plan.setup.ranks == count and places(plan) == places(found.plan)]
        fastest = min(plan.time.parts["total"] for plan in all_used if plan.fits)
        assert fastest > (1 - 2 * NO_GAIN) * found.plan.time.parts["total"], (model, method, gib)
