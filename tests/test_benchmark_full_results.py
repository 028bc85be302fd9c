"""benchmarks/full_results.py reads what full_runs.py writes: of each kind of optimizer state the newest run."""

import json

import pytest

from benchmarks import full_results, full_runs

ENTRIES = {entry["name"]: entry for entry in json.loads(full_runs.ENTRIES.read_text(encoding="utf-8"))}
TOOK = {
    "micro_batch": 2, "kept_layers": 0, "step_seconds": [2.0, 1.9], "peak_allocated_gib": 9.87,
    "median_tokens_per_second": 24321, "gpu_name": "NVIDIA H100 80GB HBM3",
}  # fmt: skip


def entry(name: str, **changes) -> dict:
    return ENTRIES[name] | TOOK | {"date": "2026-11-28"} | changes


@pytest.fixture
def table(monkeypatch):
    def table(*entries: dict) -> list[str]:
        monkeypatch.setattr(full_results, "full_runs", lambda: list(entries))
        return full_results.optimizer_table().splitlines()[2:]

    return table


def test_kinds_of_states_are_told_apart(table):
    names = [name for name in ENTRIES if name.startswith("1b, ") and "12 GB" not in name]
    lines = table(*(entry(name, peak_allocated_gib=20.0 - n) for n, name in enumerate(names)))
    assert [line.split(" | ")[1] for line in lines] == [
        "AdamW, float32", "RMSprop, float32", "Adagrad, float32", "AdamW, `bf16_8bit`",
        "AdamW, `bf16_8bit`, they and gradients in host RAM",
    ]  # fmt: skip
    assert [line.split(" | ")[2] for line in lines] == ["16", "12", "12", "6.031", "2"]
    assert lines[0].startswith("| 1B | ") and lines[0].endswith("| 20.0 | 24,321 | H100, 2026-11-28 |")


def test_the_newest_run_of_a_kind_counts_and_no_other_setting_does(table):
    name = "8b, in memory, two rows"
    older, newer = entry(name, date="2026-11-27"), entry(name, peak_allocated_gib=50.5)
    kept, several = entry(name, kept_layers=8), entry("70b, 20 layers, 2 GPUs", gpus=2)
    disturbed = entry(name, date="2026-11-29", disturbed="2.7 GiB of the GPU were in use before")
    (line,) = table(newer, older, kept, several, disturbed)
    assert line.startswith("| 8B | AdamW, `bf16_8bit` | ") and "| 50.5 |" in line
    (alone,) = table(disturbed)
    assert alone.endswith("| 9.9 | disturbed | H100, 2026-11-29 |")


def test_a_run_with_fewer_layers_is_planned_with_them():
    ten, twenty = (
        full_results.setup_of_full_run(entry(f"70b, {layers} layers, 2 GPUs", layers=layers)) for layers in (10, 20)
    )
    assert (ten.shape.layers, twenty.shape.layers) == (10, 20) and not ten.saves
    assert (ten.micro_batch, ten.accumulation, ten.ranks) == (2, 4, 2)


def test_what_a_card_showed_counts_where_it_was_the_runs_alone():
    took = entry("8b, 24 GB, two rows", peak_reserved_gib=10.5, peak_by_nvidia_smi_gib=12.0)
    assert full_results.card_gib(took) == (pytest.approx(9.87 + 1.5), 12.0)
    assert (
        full_results.card_gib(took | {"disturbed": "yes"}) is None
        and full_results.card_gib(entry("1b, RMSprop")) is None
    )
