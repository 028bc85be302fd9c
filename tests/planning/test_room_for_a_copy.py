"""Whether checkpoints are written while training goes on: `plan` looks for room for a copy in host RAM."""

import math
from dataclasses import replace

import pytest

from fitune.config import run as runs
from fitune.planning.async_save import how_it_saves, waits_for_the_disk, with_async_save
from fitune.planning.fill import filled, resolve
from fitune.planning.limits import limits_of
from fitune.planning.memory import host_peak
from fitune.planning.plan import HOST_ERROR, make_plan
from fitune.planning.presets import preset_runs
from fitune.planning.sizes import GIB

FULL = ("llama3_70b_full", "fsdp_full_16x80gb")


def _with_ram(gib: float, *sets: str):
    return resolve(*FULL, (f"profile.host_memory_gib={gib}", *sets))


def test_a_copy_is_made_where_it_has_room_for_sure():
    plan = make_plan(_with_ram(512), limits_of(_with_ram(512)))
    copy = plan.host["step"]["copy of a checkpoint"]
    assert copy == pytest.approx(70.55e9 * 12 / 2, rel=0.001), "half of the float32 weights and moments, two machines"
    assert plan.setup.async_save and plan.fits
    needed = host_peak(plan.setup) / GIB * (1 + HOST_ERROR)
    assert _with_ram(math.ceil(needed)).profile.async_save is True
    assert _with_ram(math.floor(needed)).profile.async_save is False


def test_what_is_asked_for_is_done_or_does_not_fit():
    assert _with_ram(512, "profile.async_save=false").profile.async_save is False
    asked = _with_ram(64, "profile.async_save=true")
    assert asked.profile.async_save is True
    assert [verdict.resource for verdict in make_plan(asked, limits_of(asked)).verdicts if not verdict.fits] == [
        "host RAM"
    ]


def test_no_copy_without_saves_or_of_unknown_room():
    assert _with_ram(512, "training.save_strategy='no'").profile.async_save is False
    run = runs.resolve(*FULL)
    assert run.profile.async_save == "auto" and not run.profile.saves_async
    assert with_async_save(run, replace(limits_of(run), host=math.inf)).profile.async_save is False


def test_it_is_said():
    run = _with_ram(64)
    said = "a checkpoint has 846.6 GB: training waits while it is written; a copy in each machine's RAM takes 394.2 GiB"
    assert waits_for_the_disk(run).startswith(said)
    in_background = _with_ram(512)
    assert waits_for_the_disk(in_background) is None
    setup = make_plan(in_background, limits_of(in_background)).setup
    assert "copied to each machine's RAM (394.2 GiB), written while training goes on" in how_it_saves(setup)
    assert how_it_saves(replace(setup, saves=False)) is None


def test_training_waits_for_the_disk_only_where_a_shipped_profile_keeps_the_model_in_ram():
    """What a profile states of RAM is what such machines have: 64 GiB beside eight cards made each save wait."""
    waits = set()
    for recipe in (f"llama3_{size}_{method}" for size in ("8b", "70b") for method in ("qlora", "lora", "full")):
        for run in preset_runs(recipe, runs.load_recipe(recipe)):
            if run.profile.num_gpus and not filled(run, limits_of(run)).profile.saves_async:
                waits.add((recipe, run.profile_name))
                assert run.accelerate.offload_params or run.profile.optimizer_offload, (recipe, run.profile_name)
    assert ("llama3_8b_full", "full_1x24gb") in waits and len(waits) <= 4
