"""docs/machines.md's table is what the search finds, and no card stays idle in it that would be of use."""

from pathlib import Path

import pytest

from benchmarks.machines import GPUS, METHODS, MODELS, cell, host_gib
from fitune.planning.limits import given_machine
from fitune.planning.search import NO_GAIN, find, places

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line.strip("| \n").split(" | ") for line in (ROOT / "docs/machines.md").open(encoding="utf-8")]
CELLS = {tuple(row[:3]): row[3:] for row in ROWS if len(row) == 3 + len(GPUS)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_the_table_of_24_gib_cards_is_what_is_found(model, method):
    """`python benchmarks/machines.py --check` is the same for all cards."""
    shown = CELLS[model.upper(), method, "24"]
    assert shown == [cell(f"llama3_{model}_{method}", count, 24) for count in GPUS]


def test_a_card_stays_idle_only_where_it_is_of_no_use():
    idle = [(key, GPUS[n]) for key, cells in CELLS.items() for n, text in enumerate(cells) if f" of {GPUS[n]}" in text]
    assert idle and {count for _, count in idle} == {5}
    for (model, method, gib), count in idle[::6]:
        found = find(
            f"llama3_{model.lower()}_{method}", (), given_machine(count, float(gib), host_gib(count, float(gib)))
        )
        all_used = [plan for plan in found.tried if plan.setup.ranks == count and places(plan) == places(found.plan)]
        fastest = min(plan.time.parts["total"] for plan in all_used if plan.fits)
        assert fastest > (1 - 2 * NO_GAIN) * found.plan.time.parts["total"], (model, method, gib)
