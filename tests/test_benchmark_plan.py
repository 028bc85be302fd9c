"""benchmarks/plan.json resolves, and benchmarks/tiers.py keeps to the GPUs' memory and to its time."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from patience import PATIENCE_SECONDS

from benchmarks import found, same_losses, tables, tier_run, tiers
from fitune.config.model_shapes import find_shape
from fitune.planning.fill import resolve
from fitune.planning.hardware import this_machine
from fitune.planning.memory import MEASURED, gpu_peak
from fitune.planning.plan import setup_of
from fitune.planning.sizes import GIB

PLANS = json.loads((Path(__file__).resolve().parents[1] / "benchmarks" / "plan.json").read_text())
KEYS = {"recipe", "profile", "checkpoint", "cap_gib", "steps", "set", "resume", "label", "seconds"}


@pytest.mark.parametrize("plan", PLANS, ids=tiers.name_of)
def test_run_resolves(plan):
    assert set(plan) <= KEYS
    run = resolve(plan["recipe"], plan["profile"], tuple(plan.get("set", ())))
    assert plan["cap_gib"] < run.profile.gpu_memory_gib
    assert not plan.get("resume") or ("training.save_strategy='no'" not in plan["set"] and plan["steps"] == 4)
    shape = find_shape(run.recipe.base.model)
    layers = plan["checkpoint"].split("-")[2:]
    setup = setup_of(run, replace(shape, layers=int(layers[0])) if layers else shape)
    assert gpu_peak(setup).total <= (plan["cap_gib"] * GIB + MEASURED.outside_allocator), "refused before it starts"


def test_runs_are_chosen_by_name_or_by_their_words():
    def names(*only: str) -> list[str]:
        return [tiers.name_of(plan) for plan in tiers.choose(PLANS, list(only), ["load"])]

    assert names("llama3_8b_qlora single_gpu") == ["llama3_8b_qlora single_gpu"]
    assert len(names("llama3_8b_qlora sweep")) == 4 and all(
        "sweep mb" in name for name in names("llama3_8b_qlora sweep")
    )
    assert names("load") == []
    with pytest.raises(SystemExit, match="single_gpuu: no run has these words"):
        names("single_gpuu")


def test_many_rows_are_different_rows(tmp_path):
    tiers.write_many_rows(tmp_path / "rows.jsonl", copies=2)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(set(rows)) == len(rows) > 700


def test_names_are_different():
    assert len({tiers.name_of(plan) for plan in PLANS}) == len(PLANS)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=86 * 2**30))


def test_tasks_run_side_by_side_within_the_memory(two_gpus, tmp_path):
    used, most, lock, both = [0.0, 0.0], [0.0, 0.0], threading.Lock(), threading.Barrier(2)

    def task(name: str, gib: float, *gpus: int) -> tiers.Task:
        def change(by: float) -> None:
            with lock:
                for gpu in gpus:
                    used[gpu] += by
                    most[gpu] = max(most[gpu], used[gpu])

        def run() -> dict:
            change(gib)
            if name in ("a", "c"):
                both.wait(PATIENCE_SECONDS)
            change(-gib)
            return {"ok": True}

        return tiers.Task(name, 0, run, gib, gpus)

    results = tiers.Results(tmp_path, 60, {})
    tasks = [task("a", 50, 0, 1), task("b", 40, 0), task("c", 30, 1), task("d", 30, 0, 1), task("e", 79, 1)]
    tiers.run_side_by_side(tasks, results)
    assert most[0] <= 80 and most[1] == 80, "a and c at once, e after them"
    assert all(results.found[task.name]["ok"] for task in tasks)


def test_what_is_done_or_would_not_end_in_time_is_not_begun(two_gpus, tmp_path):
    begun = []

    def task(name: str, seconds: float) -> tiers.Task:
        return tiers.Task(name, seconds, lambda: begun.append(name) or {"ok": True})

    tiers.run_alone([task("a", 1), task("long", 90)], tiers.Results(tmp_path, 60, {"commit": "abc"}))
    tiers.run_side_by_side([task("a", 1), task("b", 1)], tiers.Results(tmp_path, 60, {"commit": "def"}))
    found = json.loads((tmp_path / "results.json").read_text())
    assert begun == ["a", "b"] and [found[name]["commit"] for name in begun] == ["abc", "def"]


def test_an_error_is_a_result(two_gpus, tmp_path):
    results = tiers.Results(tmp_path, 60, {})
    tiers.run_alone([tiers.Task("a", 1, lambda: {}["missing"])], results)
    assert results.found["a"]["ok"] is False and "missing" in results.found["a"]["error"]


def test_a_resume_is_part_of_its_run_and_follows_only_one_that_ended_well(two_gpus, tmp_path):
    results = tiers.Results(tmp_path, 60, {})
    tiers.run_alone([tiers.Task("good", 1, lambda: {"ok": True}), tiers.Task("bad", 1, lambda: {"ok": False})], results)
    again = [tiers.Task(name, 1, lambda: {"ok": True, "after": 3}, resumes=name) for name in ("good", "bad")]
    tiers.run_side_by_side(again, results)
    assert results.found["good"]["resumed"] == {"ok": True, "after": 3}
    assert set(results.found) == {"good", "bad"} and "resumed" not in results.found["bad"]
    assert not results.is_due(again[0])


def test_the_worst_rank_is_the_one_with_most_on_its_gpu():
    ranks = [{"pid": 1, "peak_reserved_gib": 9.5}, {"pid": 2, "peak_reserved_gib": 9.0}]
    told = SimpleNamespace(gpu_peak_of={1: 10.5, 2: 11.0, 3: 70.0}, gpu_peak=21.5)
    assert tier_run.worst_rank(ranks, told) == (11.0, 2.0)
    untold = SimpleNamespace(gpu_peak_of={}, gpu_peak=21.5)
    assert tier_run.worst_rank(ranks, untold) == (11.0, 1.5), "the mean of what lies outside the allocators"


def test_what_a_run_took_is_counted_from_a_machine_at_rest(monkeypatch):
    host = iter([9.0, 7.0, 5.0, 4.98, 1.0])
    monkeypatch.setattr(tier_run, "_host_used", lambda: next(host))
    monkeypatch.setattr(tier_run, "_gpu_used", lambda: 0.5)
    monkeypatch.setattr(tier_run.time, "sleep", lambda _: None)
    assert tier_run._used_at_rest() == (0.5, 4.98)


def test_a_row_of_the_table_is_the_profile_as_it_is(monkeypatch):
    run = tables.as_profiled_now({"recipe": "llama3_8b_qlora", "profile": "single_gpu", "gpu_name": "NVIDIA H200"})
    shape = find_shape(run.recipe.base.model)
    shipped = {"recipe": run.recipe_name, "profile": run.profile_name, "date": "2026-01-01", "layers": shape.layers,
               "gpu_name": "NVIDIA H200",
               "micro_batch": run.profile.micro_batch, "kept_layers": run.profile.kept_layers,
               "activation_offload": False,
               "gradient_accumulation_steps": run.gradient_accumulation_steps, "peak_gpu_gib": 19.0}  # fmt: skip
    sweep = shipped | {"label": "sweep mb8", "peak_gpu_gib": 20.0}
    others = [
        shipped | {"micro_batch": 8},
        sweep | {"gradient_accumulation_steps": 7}, shipped | {"label": "from-bf16"},
        shipped | {"layers": 4},
    ]  # fmt: skip
    for measured, shown in (([sweep, *others], [20.0]), ([shipped, sweep], [19.0]), (others, [])):
        monkeypatch.setattr(tables, "measured_tiers", lambda measured=measured: measured)
        assert [tier["peak_gpu_gib"] for tier in tables.newest_tiers()] == shown


def test_a_run_from_before_its_profile_was_changed_says_so(monkeypatch):
    before = next(run for run in tables.measured_tiers() if run["profile"] == "single_gpu" and tables.is_whole(run))
    now = tables.as_profiled_now(before).profile
    monkeypatch.setattr(tables, "measured_tiers", lambda: [before | {"micro_batch": 8, "kept_layers": 0}])
    assert not tables.newest_tiers()
    assert f"| 8 (now {now.micro_batch}) | 0 (now {now.kept_layers}) |" in tables.tier_table()


def test_a_sweep_is_compared_with_its_own_first_row(monkeypatch):
    sweep = {"recipe": "r", "profile": "p", "gpu_name": "g", "commit": "c", "date": "2026-01-01", "micro_batch": 1,
             "kept_layers": 0, "peak_gpu_gib": 1.0, "tokens_per_second_per_gpu": 100.0,
             "label": "sweep mb1"}  # fmt: skip
    faster = sweep | {"micro_batch": 8, "tokens_per_second_per_gpu": 150.0}
    elsewhere = faster | {"gpu_name": "another"}
    monkeypatch.setattr(tables, "measured_tiers", lambda: [elsewhere, sweep, faster])
    assert [line.split("|")[-2].strip() for line in tables.sweep_table().splitlines()[2:]] == ["", "100%", "150%"]


def test_a_profile_keeps_all_but_what_it_expects():
    run = {"recipe": "r", "peak_gpu_gib": 1.5, "peak_host_gib": 2, "date": "2026-01-01", "commit": "abc"}
    lines = "micro_batch: 1  # a comment\n"
    once = tables.with_expected(lines, [run])
    assert once == lines + "expected:\n  r: {peak_gpu_gib: 1.5, peak_host_gib: 2, source: measured 2026-01-01 abc}\n"
    assert tables.with_expected(once, [run]) == once and tables.with_expected(once, []) == lines
    with pytest.raises(AssertionError, match="not the last key"):
        tables.with_expected(once + "embedding_offload: true\n", [run])


@pytest.mark.parametrize("pair", ["llama3_8b_qlora=single_gpu", "llama3_8b_lora=fsdp_2x40gb"])
def test_the_search_sees_as_many_cards_as_there_are_of_the_presets_size(pair, tmp_path, monkeypatch):
    cards = "".join(f"GPU-{number}, NVIDIA H100 80GB HBM3, 81559, 81000, 9.0, 5, 16, Disabled\\n" for number in "01")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{cards}'\n")
    (tmp_path / "real" / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'real'}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    search, preset = found.runs_of(pair, tmp_path)
    command = " ".join(tier_run.train_command(search, tmp_path))
    assert "--profile" not in command and "--profile" in " ".join(tier_run.train_command(preset, tmp_path))
    monkeypatch.setenv("PATH", search["environment"]["PATH"])
    gib = resolve(*pair.split("=")).profile.gpu_memory_gib
    machine = this_machine()
    assert [(gpu.name, gpu.total_gib, gpu.free_gib) for gpu in machine.gpus] == [
        ("NVIDIA H100 80GB HBM3", gib, gib)
    ] * 2
    assert machine.gpus[0].capability == 9.0
    assert search["cap_gib"] * GIB + MEASURED.outside_allocator == pytest.approx(gib * GIB, abs=0.01 * GIB)


def test_so_many_gpus_are_a_profile(tmp_path):
    run = resolve("llama3_8b_qlora", same_losses.profile_of("3", tmp_path))
    assert (run.accelerate.num_processes, run.accelerate.offload_params) == (3, False)
    assert same_losses.profile_of("single_gpu", tmp_path) == "single_gpu"
