"""Gathered weights that stay until the backward pass: where `plan` keeps them, and what it says and writes."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from fitune.cli import cli
from fitune.config import run as runs
from fitune.config.accelerate_config import read_accelerate_config, written_out
from fitune.config.model_shapes import find_shape
from fitune.config.schema import AUTO
from fitune.errors import UsageError
from fitune.launching.run_folder import as_started, begin_to_train, open_run_folder
from fitune.planning.fill import AS_FAST, filled, fits, resolve, with_room_for_error
from fitune.planning.gpu_models import gpu_model, likely_model
from fitune.planning.limits import given_machine, limits_of
from fitune.planning.memory import gpu_peak
from fitune.planning.outlook import look_around
from fitune.planning.plan import make_plan, setup_of
from fitune.planning.search import find
from fitune.planning.step_time import step_seconds

FOUR_H200 = ["plan", "llama3_8b_full", "--gpus", "4", "--gpu", "H200", "--gpu-memory", "80", "--host-memory", "512",
             "--set", "global_batch_size=8"]  # fmt: skip
KEPT = ("llama3_8b_lora", "fsdp_2x80gb")
"Kept, by the shipped profile, if the two cards hold one copy."
ONE_COPY = ("profile.replicas=1",)


def as_given(recipe: str, profile: str, value: bool | str, *sets: str):
    """The setup of a run whose accelerate config says `value`, filled by `plan`."""
    run = runs.with_resharding(runs.resolve(recipe, profile, (*ONE_COPY, *sets)), value)
    return setup_of(filled(run, limits_of(run)), find_shape(run.recipe.base.model))


def seconds(setup, gpu_gib: float) -> float:
    return step_seconds(setup, likely_model(gpu_gib))["total"]


def test_they_are_kept_where_that_is_faster_and_there_is_room():
    freed, kept, chosen = (as_given(*KEPT, value) for value in (True, False, AUTO))
    assert seconds(kept, 80) * (1 + AS_FAST) < seconds(freed, 80)
    assert chosen == kept and not chosen.reshard
    gathered_once = (chosen.shape.layers - 1) * chosen.unsharded_layer
    assert gpu_peak(kept).total - gpu_peak(freed).total == pytest.approx(gathered_once, rel=0.05)
    assert fits(chosen, with_room_for_error(limits_of(resolve(*KEPT))))


def test_they_are_freed_where_keeping_them_gains_too_little():
    freed, kept, chosen = (as_given("llama3_8b_qlora", "fsdp_2x80gb", value) for value in (True, False, AUTO))
    assert seconds(kept, 80) < seconds(freed, 80) < (1 + AS_FAST) * seconds(kept, 80), "else this shows nothing"
    assert chosen == freed and chosen.reshard


def test_they_are_freed_where_kept_layers_need_the_memory_more():
    """Each is tried with as many kept layers as fit beside it."""
    freed, kept, chosen = (as_given("llama3_8b_full", "fsdp_2x80gb", value) for value in (True, False, AUTO))
    assert kept.kept_layers < freed.kept_layers and seconds(kept, 80) > seconds(freed, 80)
    assert chosen == freed


def test_they_are_weighed_beside_rows_and_layers_that_are_given():
    given = ("profile.micro_batch=4", "profile.kept_layers=32")
    assert not as_given(*KEPT, AUTO, *given).reshard
    slow_link = replace(likely_model(80), peer_link_gb_s=2)
    run = runs.resolve("llama3_8b_full", "fsdp_2x80gb", ("profile.micro_batch=1", "profile.kept_layers=0"))
    limits = replace(limits_of(run), gpu=100)
    assert not filled(run, limits, slow_link).accelerate.reshard_after_forward
    assert filled(run, limits_of(run), slow_link).accelerate.reshard_after_forward, "they do not fit"


def test_method_fulls_stay_to_the_end_of_the_step():
    """One gather, or cast from float32, for all passes; they are there while the last of them go backward."""
    sets = ("profile.micro_batch=4", "profile.kept_layers=0", "profile.optimizer_state=fp32")
    for profile in ("fsdp_2x80gb", "full_1x48gb"):
        run = runs.resolve("llama3_8b_full", profile, (*sets, "profile.optimizer_offload=false"))
        assert run.may_keep_gathered
        setup = replace(setup_of(run, find_shape(run.recipe.base.model)), accumulation=4, reshard=True)
        kept = replace(setup, reshard=False)
        assert (setup.gathers, kept.gathers, replace(kept, accumulation=1).gathers) == (2, 1 / 4, 1)
        assert seconds(kept, 80) < seconds(setup, 80)
        phase = "backward, second layer"
        more = gpu_peak(kept).phases[phase] - gpu_peak(setup).phases[phase]
        assert more == pytest.approx((kept.shape.layers - 1) * kept.unsharded_layer, rel=0.05)
    small = runs.resolve("llama3_8b_full", "full_1x48gb")
    assert not small.may_keep_gathered  # kept in bf16, as they compute


@pytest.mark.parametrize(
    ("recipe", "profile"),
    [
        ("llama3_8b_qlora", "single_gpu"),
        ("llama3_8b_full", "fsdp_offload_1x80gb"),
        ("llama3_70b_qlora", "fsdp_offload_2x24gb"),
        ("tiny_lora", "cpu_2proc"),
    ],
)
def test_nothing_is_kept_where_nothing_is_gathered_or_cast(recipe, profile):
    run = runs.resolve(recipe, profile)
    assert not run.may_keep_gathered
    slow_link = replace(gpu_model("H100"), peer_link_gb_s=0.1)
    plenty = replace(limits_of(run), gpu=1000, host=1000)
    assert filled(run, plenty, slow_link).accelerate.reshard_after_forward is True


def test_machines_of_one_gpu_gather_nothing_with_a_copy_on_each():
    machine = given_machine(1, 80, 512)
    plan = find("llama3_8b_lora", ("profile.replicas=2",), machine, gpu_model("H100"), machines=2).plan
    assert plan.setup.shards == 1 and plan.run.accelerate.reshard_after_forward is True


@pytest.mark.parametrize("said", [True, False])
def test_the_accelerate_configs_word_counts(said, tmp_path):
    other_way = as_given(*(KEPT if said else ("llama3_8b_qlora", "fsdp_2x80gb")), AUTO)
    assert other_way.reshard != said
    file = tmp_path / "accelerate.yaml"
    run = runs.resolve(*(KEPT if said else ("llama3_8b_qlora", "fsdp_2x80gb")))
    file.write_text(written_out(run.accelerate.model_copy(update={"reshard_after_forward": said})))
    assert f"  fsdp_reshard_after_forward: {str(said).lower()}\n" in file.read_text()
    read = run.model_copy(update={"accelerate": read_accelerate_config(file)})
    assert filled(read, limits_of(read)).accelerate.reshard_after_forward is said


def test_auto_is_no_word_of_accelerates(tmp_path):
    file = tmp_path / "accelerate.yaml"
    accelerate = runs.resolve(*KEPT).accelerate
    assert "reshard" not in written_out(accelerate)
    file.write_text(written_out(accelerate.model_copy(update={"reshard_after_forward": False})).replace("false", AUTO))
    with pytest.raises(UsageError, match=r"reshard_after_forward must be true or false, not 'auto'.*plan chooses"):
        read_accelerate_config(file)


def test_plan_says_it_in_words_and_in_json():
    outcome = CliRunner().invoke(cli, FOUR_H200)
    assert outcome.exit_code == 0, outcome.output
    lines = {line.split("  ")[0]: line for line in outcome.output.splitlines()}
    assert lines["a pass"].endswith("2 x 3,072 tokens, 32 of 32 layers kept, gathered weights kept")
    assert "layers kept, gathered weights kept, " in lines["chosen"]
    assert json.loads(CliRunner().invoke(cli, [*FOUR_H200, "--json"]).output)["reshard_after_forward"] is False
    smaller = [*FOUR_H200[:7], "40", *FOUR_H200[8:]]
    assert "gathered weights" not in CliRunner().invoke(cli, smaller).output
    assert json.loads(CliRunner().invoke(cli, [*smaller, "--json"]).output)["reshard_after_forward"] is True


def test_what_fits_at_most_is_told_with_nothing_kept():
    run = resolve(*KEPT, ONE_COPY)
    kept, freed = (make_plan(each, limits_of(run)) for each in (run, runs.with_resharding(run, True)))
    assert not kept.setup.reshard
    assert look_around(kept) == look_around(freed)


def test_a_run_keeps_what_plan_chose(tmp_path):
    """In run.yaml and accelerate.yaml, and when it goes on, though `plan` might choose otherwise then."""
    run = resolve(*KEPT, ONE_COPY, str(tmp_path / "run"))
    assert run.accelerate.reshard_after_forward is False
    with open_run_folder(run, resume=False):
        begin_to_train(run)
    assert runs.load(run.folder) == run
    assert read_accelerate_config(run.folder / "accelerate.yaml").reshard_after_forward is False
    assert runs.resolve_again(run.folder).accelerate == run.accelerate
    typed_again = runs.resolve(*KEPT, (*ONE_COPY, "training.max_steps=9", "profile.micro_batch=1"), str(run.folder))
    assert as_started(typed_again).accelerate == run.accelerate
    moved_to_one_gpu = runs.resolve("llama3_8b_lora", "fsdp_1x48gb", output=str(run.folder))
    assert not as_started(moved_to_one_gpu).accelerate.keeps_gathered


def test_a_run_of_an_earlier_version_goes_on_as_it_was(tmp_path):
    run = resolve(*KEPT, ONE_COPY, str(tmp_path / "run"))
    earlier = runs.with_resharding(run, True)
    run.folder.mkdir()
    (run.folder / "run.yaml").write_text(runs.dump(earlier))
    assert runs.load(run.folder).accelerate.reshard_after_forward is True
    again = runs.resolve_again(run.folder)
    assert again.accelerate.reshard_after_forward is True
    assert filled(again, limits_of(again)).accelerate.reshard_after_forward is True
