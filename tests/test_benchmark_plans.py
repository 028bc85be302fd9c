"""Every run that benchmarks/plans/ asks for resolves, with the keys that benchmarks/tiers.py reads."""

import json
from pathlib import Path

import pytest

from fitune import run as runs

PLANS = Path(__file__).resolve().parents[1] / "benchmarks" / "plans"
KEYS = {"recipe", "profile", "checkpoint", "data", "cap_gib", "steps", "set", "resume", "label", "timeout"}
ENTRIES = {f"{file.stem}-{number}": entry for file in sorted(PLANS.glob("*.json"))
           for number, entry in enumerate(json.loads(file.read_text()))}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_run_resolves(entry):
    assert set(entry) <= KEYS
    run = runs.resolve(entry["recipe"], entry["profile"], tuple(entry.get("set", ())))
    assert entry["cap_gib"] < run.profile.gpu_memory_gib
    assert not entry.get("resume") or "training.save_strategy='no'" not in entry.get("set", ())


def test_each_plan_is_a_part_of_the_script():
    script = (PLANS.parent / "measure.sh").read_text()
    assert all(f"\n  {file.stem})" in script for file in PLANS.glob("*.json"))
