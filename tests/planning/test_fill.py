"""What a profile leaves to `plan`: the rows a pass and kept layers with the shortest predicted step that fit."""

import json
import math
from dataclasses import replace

import pytest

from fitune.config import run as runs
from fitune.config.model_shapes import find_shape
from fitune.planning.fill import AS_FAST, MUST_GAIN_BY_MOVING, filled, filled_here, fits, resolve, with_room_for_error
from fitune.planning.gpu_models import gpu_model, likely_model
from fitune.planning.limits import Limits, limits_of
from fitune.planning.machine import Gpu, Machine
from fitune.planning.memory import gpu_peak
from fitune.planning.plan import ERROR, setup_of, verdicts
from fitune.planning.sizes import GIB
from fitune.planning.step_time import step_seconds

CARDS = [
    ("llama3_8b_qlora", "single_gpu"),
    ("llama3_8b_lora", "fsdp_1x48gb"),
    ("llama3_8b_full", "fsdp_2x80gb"),
    ("llama3_70b_qlora", "fsdp_4x24gb"),
    ("llama3_70b_qlora", "fsdp_offload_1x24gb"),
]


def setup(run):
    return setup_of(run, find_shape(run.recipe.base.model))


@pytest.mark.parametrize(("recipe", "profile"), CARDS)
def test_nothing_that_fits_is_faster_but_by_little(recipe, profile):
    run = resolve(recipe, profile)
    assert not run.left_to_plan
    chosen, stated = setup(run), limits_of(run)
    assert chosen.micro_batch * chosen.accumulation * chosen.ranks == run.recipe.global_batch_size
    room = replace(stated, gpu=stated.gpu / (1 + ERROR))
    gpu = likely_model(stated.gpu)
    assert fits(chosen, room)
    seconds = step_seconds(chosen, gpu)["total"]
    for rows in runs.micro_batches(run.recipe, run.accelerate):
        passes = math.ceil(run.recipe.global_batch_size / (rows * chosen.ranks))
        for kept in range(chosen.shape.layers + 1):
            other = replace(chosen, micro_batch=rows, accumulation=passes, kept_layers=kept)
            bound = seconds if rows <= chosen.micro_batch else seconds / (1 + AS_FAST)
            assert step_seconds(other, gpu)["total"] >= bound or not fits(other, room), (rows, kept)


def test_of_what_is_as_fast_the_fewest_rows_are_taken():
    def on_an_h200(*sets: str):
        run = runs.resolve("llama3_70b_qlora", "fsdp_offload_4gpu", sets)
        return setup(filled(run, limits_of(run), gpu_model("NVIDIA H200")))

    one, two = (on_an_h200(f"profile.micro_batch={rows}") for rows in (1, 2))
    one_row, two_rows = (step_seconds(each, gpu_model("NVIDIA H200"))["total"] for each in (one, two))
    assert two_rows < one_row < (1 + AS_FAST) * two_rows, "else this shows nothing"
    assert on_an_h200().micro_batch == 1


def test_what_is_given_stays_and_the_rest_is_chosen():
    rows = resolve("llama3_8b_qlora", "single_gpu", ("profile.micro_batch=8",))
    assert rows.profile.micro_batch == 8 and 0 < rows.profile.kept_layers < 8
    assert rows.gradient_accumulation_steps == 1
    kept = resolve("llama3_8b_qlora", "single_gpu", ("profile.kept_layers=32",))
    assert kept.profile.kept_layers == 32 and kept.profile.micro_batch == 1


def test_less_memory_keeps_fewer_layers_and_none_where_nothing_fits():
    run = runs.resolve("llama3_8b_qlora", "single_gpu", ("profile.micro_batch=1",))
    kept = [filled(run, Limits(gpu, 32, 1)).profile.kept_layers for gpu in (24, 16, 12, 9, 6)]
    assert kept[0] == 32 and sorted(kept, reverse=True) == kept and kept[-1] == 0 and len(set(kept)) == 5


def test_a_card_with_less_free_memory_than_its_profile_states_is_filled_as_far_as_it_goes(monkeypatch, tmp_path):
    run = runs.resolve("llama3_8b_qlora", "single_gpu", (), str(tmp_path / "run"))
    busy = Machine((Gpu("NVIDIA GeForce RTX 4090", 24, 14.0),), 64, 60)
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: busy)
    monkeypatch.delenv("FITUNE_GPU_CAP_GIB", raising=False)
    here = filled_here(run)
    assert here.profile.kept_layers < resolve("llama3_8b_qlora", "single_gpu").profile.kept_layers
    assert fits(setup(here), Limits(14.0 / (1 + ERROR), 60, 1))


def test_a_resumed_run_keeps_what_was_chosen_when_it_started(tmp_path):
    from fitune.launching.run_folder import as_started

    asked = runs.resolve("llama3_8b_qlora", "single_gpu", (), str(tmp_path))
    numbers = runs.with_numbers(asked, micro_batch=4, kept_layers=3)
    started, otherwise = (
        runs.with_activations(numbers, kept_attention=value, activation_offload=value) for value in (False, True)
    )
    (tmp_path / "run.yaml").write_text(runs.dump(started), encoding="utf-8")
    assert as_started(asked) == started
    given = runs.resolve("llama3_8b_qlora", "single_gpu", ("profile.micro_batch=2",), str(tmp_path))
    assert as_started(given).profile.micro_batch == 2 and as_started(given).profile.kept_layers == 3
    (tmp_path / "run.yaml").write_text(runs.dump(otherwise), encoding="utf-8")
    assert as_started(asked) == otherwise
    refusing = ("profile.kept_attention=false", "profile.activation_offload=false")
    refused = as_started(runs.resolve("llama3_8b_qlora", "single_gpu", refusing, str(tmp_path)))
    assert not (refused.profile.keeps_attention or refused.profile.moves_activations)
    unknown = runs.dump(started).replace("  kept_attention: false\n", "")  # of an earlier version
    (tmp_path / "run.yaml").write_text(unknown, encoding="utf-8")
    assert unknown != runs.dump(started) and as_started(asked).profile.kept_attention is False


LONG = ("base.model=meta-llama/Llama-3.1-8B", "max_length=32768", "global_batch_size=1", "profile.gpu_memory_gib=80")


def test_attention_is_kept_where_rows_are_long_and_that_is_faster():
    """More layers kept whole would take its memory; of rows in host RAM it takes RAM alone."""
    gpu = gpu_model("NVIDIA H200")
    chosen = setup(resolve("llama3_8b_qlora", "single_gpu", LONG, gpu=gpu))
    without = setup(resolve("llama3_8b_qlora", "single_gpu", (*LONG, "profile.kept_attention=false"), gpu=gpu))
    assert chosen.kept_attention and 0 < chosen.kept_layers < without.kept_layers < 32
    seconds, seconds_without = (step_seconds(each, gpu)["total"] for each in (chosen, without))
    assert seconds * (1 + AS_FAST) < seconds_without
    in_ram = (*LONG, "profile.activation_offload=true", "profile.kept_layers=0", "profile.host_memory_gib=128")
    assert setup(resolve("llama3_8b_qlora", "single_gpu", in_ram, gpu=gpu)).kept_attention
    assert not setup(resolve("llama3_8b_qlora", "single_gpu", (*in_ram, "profile.host_memory_gib=14"))).kept_attention


def test_rows_packed_from_short_examples_are_not_long(tmp_path):
    """By what `prepare` counted. A few long ones among many short ones have most of the tokens, and of the time."""
    packed = (*LONG, f"data.prepared={tmp_path}", "packing=true")
    for examples, keeps in (({"32768": 3}, True), ({"256": 400}, False), ({"256": 400, "32768": 12}, True)):
        report = {"tokens": {"histogram": examples}}
        (tmp_path / "report.json").write_text(json.dumps(report))
        found = [resolve("llama3_8b_qlora", "single_gpu", sets) for sets in (packed, (*packed, "packing=false"))]
        assert [run.profile.keeps_attention for run in found] == [keeps, True]
    (tmp_path / "report.json").unlink()
    assert resolve("llama3_8b_qlora", "single_gpu", packed).profile.keeps_attention, "as long as a row"


def test_attention_is_not_kept_where_that_is_not_much_faster():
    """Short rows; rows of which all layers are kept."""
    short = [("llama3_8b_qlora", "single_gpu"), ("llama3_70b_qlora", "fsdp_offload_1x12gb")]
    assert not any(resolve(*which).profile.keeps_attention for which in short)
    fewer = (*LONG[:1], "max_length=8192", "global_batch_size=1", "profile.gpu_memory_gib=80")
    assert not resolve("llama3_8b_qlora", "single_gpu", fewer).profile.keeps_attention


def test_method_full_keeps_attention_too():
    long = ("base.model=meta-llama/Llama-3.1-8B", "max_length=32768")
    assert resolve("llama3_8b_full", "full_1x48gb", long).profile.keeps_attention


def test_what_recomputed_layers_keep_goes_to_host_ram_where_that_is_faster():
    """More rows a pass then gather, or copy, weights less often: both measured faster (docs/speed.md)."""
    gpu = gpu_model("NVIDIA H200")
    for profile, compute in (("fsdp_4x24gb", "bf16"), ("fsdp_4x24gb", "fp8"), ("fsdp_offload_1x12gb", "fp8")):
        on_gpu, chosen = (
            setup(resolve("llama3_70b_qlora", profile, (f"profile.compute={compute}", *sets), gpu=gpu))
            for sets in (("profile.activation_offload=false",), ())
        )
        assert chosen.activation_offload and chosen.micro_batch > on_gpu.micro_batch and not on_gpu.activation_offload
        seconds, seconds_on_gpu = (step_seconds(each, gpu)["total"] for each in (chosen, on_gpu))
        assert seconds * (1 + MUST_GAIN_BY_MOVING["qlora"]) < seconds_on_gpu


def test_what_recomputed_layers_keep_stays_on_the_gpu():
    """Where all layers are kept, little is gained, RAM is short, one memory is both, or numbers are given."""
    gpu = gpu_model("NVIDIA H200")
    for recipe, profile, sets in (
        ("llama3_8b_qlora", "single_gpu", ()),
        ("llama3_70b_qlora", "fsdp_1x48gb", ()),
        ("llama3_70b_qlora", "fsdp_4x24gb", ("profile.host_memory_gib=20",)),
        ("llama3_70b_qlora", "fsdp_4x24gb", ("profile.micro_batch=1", "profile.kept_layers=0")),
        ("llama3_70b_qlora", "fsdp_4x24gb", ("profile.gpu_memory_gib=36",)),  # 4 % faster, by `plan`
        ("llama3_8b_qlora", "single_gpu", ("profile.micro_batch=4", "profile.kept_layers=32")),  # fits neither way
    ):
        found = resolve(recipe, profile, ("profile.compute=bf16", *sets), gpu=gpu)
        assert found.profile.activation_offload is False, (recipe, profile, sets)
    run = runs.resolve("llama3_8b_qlora", "single_gpu")
    assert filled(run, Limits(None, 12, 1, unified=True), gpu).profile.activation_offload is False


def test_copies_are_not_for_activations_in_ram_that_gain_little():
    """Two copies with them there took as long as one without, by `plan`."""
    sets = ("profile.gpu_memory_gib=10", "profile.host_memory_gib=256", "max_length=4096", "profile.compute=bf16")
    found = resolve("llama3_8b_qlora", "fsdp_2x40gb", sets, gpu=gpu_model("RTX 3060"))
    assert found.profile.activation_offload is False


def test_what_is_said_of_activations_stays():
    """Also where it does not fit, and the other would."""
    short = ("profile.activation_offload=true", "profile.host_memory_gib=10")
    run = resolve("llama3_70b_qlora", "fsdp_4x24gb", short)
    assert run.profile.activation_offload is True and not fits(setup(run), limits_of(run))
    long = (*LONG[:2], "global_batch_size=1", "profile.gpu_memory_gib=9", "profile.activation_offload=false")
    assert resolve("llama3_8b_qlora", "single_gpu", long).profile.activation_offload is False


def test_what_fits_only_with_its_activations_in_ram_has_them_there():
    long = (*LONG[:2], "global_batch_size=1", "profile.gpu_memory_gib=9")
    assert resolve("llama3_8b_qlora", "single_gpu", long).profile.moves_activations
    typed = ("profile.micro_batch=2", "profile.kept_layers=3", "profile.compute=bf16")  # as `plan` shows them
    assert resolve("llama3_70b_qlora", "fsdp_4x24gb", typed).profile.moves_activations
    small = runs.resolve("llama3_8b_qlora", "single_gpu")
    for ram, moves in ((60, True), (0.5, False)):  # nothing fits: what comes closest
        found = filled(small, Limits(4, ram, 1))
        assert found.profile.moves_activations is moves
        assert (found.profile.micro_batch, setup(found).kept_layers) == (1, 0)


def test_layers_are_kept_in_memory_that_cpu_and_gpu_share_whatever_moves():
    """As many as fit beside inputs that move within the same memory."""
    run, shared = runs.resolve("llama3_8b_qlora", "single_gpu", ("profile.activation_offload=true",)), {}
    for gib in (14, 18):
        limits = Limits(None, gib, 1, unified=True)
        chosen = setup(filled(run, limits, gpu_model("GB10")))
        assert chosen.activation_offload and fits(chosen, limits) and chosen.kept_layers < chosen.shape.layers
        shared[gib] = chosen.kept_layers
    assert 0 < shared[14] < shared[18]


def test_numbers_that_are_given_leave_what_else_is_chosen_as_it_is():
    """Gathered weights are not kept up to the last GiB because rows and layers were typed as `plan` chose them."""
    asked = ("max_length=2048", "global_batch_size=64")
    chosen = resolve("llama3_8b_full", "fsdp_lora_8x80gb", asked)
    typed = (*asked, "profile.micro_batch=8", "profile.kept_layers=32")
    assert setup(chosen).micro_batch == 8 and setup(chosen).kept_layers == 32
    assert setup(resolve("llama3_8b_full", "fsdp_lora_8x80gb", typed)) == setup(chosen)


def test_what_is_given_and_fits_with_no_room_for_error_fits():
    """Here with activations in host RAM, and barely."""
    typed = ("profile.micro_batch=4", "profile.kept_layers=0")
    least = gpu_peak(setup(resolve("llama3_8b_qlora", "single_gpu", (*typed, "profile.activation_offload=true")))).total
    run = resolve("llama3_8b_qlora", "single_gpu", (*typed, f"profile.gpu_memory_gib={1.01 * least / GIB}"))
    assert run.profile.moves_activations and fits(setup(run), limits_of(run))
    assert not fits(setup(run), with_room_for_error(limits_of(run)))


@pytest.mark.parametrize("batch", [1000, 100_000])
def test_numbers_of_rows_that_cannot_fit_are_not_tried(batch, monkeypatch):
    """However many rows a step has: it was 4,320 and 43,716 setups that were looked at."""
    looked_at = []

    def counted(setup, *limits):
        looked_at.append(setup)
        return verdicts(setup, *limits)

    monkeypatch.setattr("fitune.planning.fill.verdicts", counted)
    run = resolve("llama3_70b_full", "fsdp_full_8x80gb", (f"global_batch_size={batch}", "max_length=8192"))
    assert len(runs.micro_batches(run.recipe, run.accelerate)) > 20
    assert fits(setup(run), limits_of(run)) and len(looked_at) < 600
