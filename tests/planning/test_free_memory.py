"""Gradients of adapters that wait have room in what is free of a GPU, not in all that it has; ranks decide alike."""

from dataclasses import replace

import pytest

from fitune.planning import limits
from fitune.planning.fill import filled_here, resolve
from fitune.planning.limits import Limits, limits_to_fill
from fitune.planning.machine import Gpu, Machine
from fitune.planning.memory import gpu_peak
from fitune.planning.plan import make_plan, setup_of, setup_to_train
from fitune.planning.search import find
from fitune.planning.sizes import GIB

SEVERAL_PASSES = ("global_batch_size=32", "profile.micro_batch=1", "profile.kept_layers=0", "profile.replicas=1")


def _machine(total: float, free: float) -> Machine:
    return Machine((Gpu("NVIDIA GeForce RTX 4090", total, free, 8.9),) * 2, 64, 64)


def test_a_search_reckons_with_what_is_free():
    partly_free, whole = (find("llama3_70b_qlora", (), _machine(total, 23.0)).plan for total in (23.99, 23.0))
    assert partly_free.setup == whole.setup and partly_free.setup.ranks == 2 and partly_free.fits
    assert partly_free.time == whole.time


def test_what_a_search_finds_says_to_its_ranks_what_is_free():
    found = find("llama3_70b_qlora", (), _machine(23.99, 23.0)).plan
    assert found.run.free_gpu_gib == 23.0 and found.run.profile.gpu_memory_gib == 23.99
    assert setup_to_train(found.run) == found.setup
    given = find("llama3_70b_qlora", ("profile.gpu_memory_gib=24",), _machine(23.99, 23.0)).plan
    assert given.run.free_gpu_gib == 23.0 and given.setup == found.setup


def test_a_run_on_gpus_with_less_free_states_that(monkeypatch, tmp_path):
    """Its ranks let gradients wait where that leaves them room, as the check before training does."""
    run = resolve("llama3_70b_lora", "fsdp_lora_8x80gb", SEVERAL_PASSES, output=str(tmp_path / "run"))
    tight = gpu_peak(setup_of(run)).total / GIB * 1.02
    eight = (Gpu("NVIDIA H100", 80, tight, 9.0),) * 8
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: Machine(eight, 512, 500))
    monkeypatch.setattr(limits, "free_disk_gib", lambda _: 1000.0)
    here = filled_here(run)
    assert here.free_gpu_gib == pytest.approx(tight) and here.profile == run.profile
    assert setup_to_train(run).adapters_wait and not setup_to_train(here).adapters_wait
    checked = make_plan(here, limits_to_fill(here))
    assert checked.setup == setup_to_train(here) and checked.fits
    free = (replace(eight[0], free_gib=80),) * 8
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: Machine(free, 512, 500))
    assert filled_here(here).free_gpu_gib is None, "a resume looks anew"


def test_a_plan_for_less_than_a_profile_states_reckons_with_less():
    run = resolve("llama3_70b_lora", "fsdp_lora_8x80gb", SEVERAL_PASSES)
    whole = make_plan(run, Limits(80, 512, 8)).setup
    less = make_plan(run, Limits(gpu_peak(replace(whole, adapters_wait=False)).total / GIB, 512, 8))
    assert whole.adapters_wait and less.setup == replace(whole, adapters_wait=False) and less.fits
