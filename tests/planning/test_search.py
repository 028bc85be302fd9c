"""What `train` and `plan --find` choose: the GPUs, what lies in RAM, rows and kept layers with the shortest step."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from fitune.cli import cli
from fitune.config import run as runs
from fitune.config.accelerate_config import read_accelerate_config, written_out
from fitune.errors import UsageError
from fitune.planning.fill import filled, fits
from fitune.planning.gpu_models import gpu_model
from fitune.planning.limits import given_machine, limits_of
from fitune.planning.machine import Gpu, Machine
from fitune.planning.outlook import nearest_changes
from fitune.planning.plan import Verdict, make_plan
from fitune.planning.presets import as_typed, preset_runs
from fitune.planning.search import find

FP32 = ("profile.optimizer_state=fp32",)
RECIPES = [f"llama3_{size}_{method}" for size in ("8b", "70b") for method in ("qlora", "lora", "full")]
CHOICES = ("ranks", "offload", "small_states", "embedding_offload", "activation_offload", "micro_batch", "kept_layers")


def chosen(plan) -> dict:
    return {key: getattr(plan.setup, key) for key in CHOICES}


def test_every_number_of_gpus_is_used_where_it_helps():
    for count in (1, 2, 3, 5, 6, 7, 8):
        found = find("llama3_70b_qlora", (), given_machine(count, 48, 128))
        setup = found.plan.setup
        passes = {n: -(-8 // n) for n in range(1, count + 1)}
        assert setup.ranks <= count and passes[setup.ranks] == passes[count], count
        assert fits(setup, found.plan.limits) and setup.micro_batch * setup.accumulation * setup.ranks >= 8


def test_cards_that_stay_idle_are_named_with_the_reason():
    five = find("llama3_8b_qlora", (), given_machine(5, 24, 64))
    assert five.idle == 1 and five.why_idle().startswith("1 of 5 GPUs stays idle: a step of 8 rows (global_batch_size)")
    assert five.why_idle().endswith(" takes as long with 5; one of 10 would use all 5")
    assert find("llama3_8b_qlora", ("global_batch_size=10",), given_machine(5, 24, 64)).idle == 0
    sixteen = find("llama3_8b_qlora", (), given_machine(16, 80, 512))
    assert sixteen.idle == 8 and sixteen.plan.run.accelerate.num_processes == 8


def test_the_line_names_the_choice_and_the_runner_up():
    found = find("llama3_70b_qlora", (), given_machine(4, 24, 64))
    line = found.in_one_line()
    assert "\n" not in line and line.startswith("plan chose 4 GPUs, one copy of the model, weights on the GPUs, ")
    assert "; next best: 4 GPUs, one copy of the model, weights in RAM, " in line
    assert line.endswith(" s a step (too little faster for the RAM it takes)")
    slower = find("llama3_8b_qlora", (), given_machine(2, 80, 256)).in_one_line()
    assert "; next best: 1 GPU, " in slower and slower.endswith(" s a step")
    states = find("llama3_8b_full", (), given_machine(2, 80, 256)).in_one_line()
    assert states.endswith(" s a step (small states round more)")


def test_what_is_given_of_the_profile_stays():
    machine = given_machine(4, 24, 64)
    assert find("llama3_8b_qlora", ("profile.num_gpus=3",), machine).plan.setup.ranks == 3
    rows = find("llama3_8b_qlora", ("profile.micro_batch=1", "profile.kept_layers=5"), machine).plan.setup
    assert (rows.micro_batch, rows.kept_layers) == (1, 5)
    assert find("llama3_70b_qlora", ("profile.activation_offload=true",), machine).plan.setup.activation_offload
    with pytest.raises(UsageError, match=r"--set profile.num_gpus=5: this machine has 4$"):
        find("llama3_8b_qlora", ("profile.num_gpus=5",), machine)
    with pytest.raises(UsageError, match="num_gpus=5: this machine has 4, and each of 2 machines takes as many"):
        find("llama3_8b_qlora", ("profile.num_gpus=5",), machine, machines=2)
    with pytest.raises(UsageError, match="give --profile too"):
        find("llama3_8b_qlora", ("profile.accelerate_config=single_gpu",), machine)


def test_what_fits_nowhere_is_refused_with_what_comes_closest():
    with pytest.raises(UsageError, match=r"llama3_70b_qlora does not fit 1 GPU with 3\.0 GiB free.*nearest: 1 GPU"):
        find("llama3_70b_qlora", (), given_machine(1, 3, 64))
    with pytest.raises(UsageError, match=r"there is no GPU here: .* `plan` for another machine, as with --gpus 1"):
        find("llama3_8b_qlora", (), Machine((), 64, 60))


def test_what_fits_nowhere_is_refused_with_what_would_fit():
    """Each proposal is tried: it fits."""
    small, ram = given_machine(1, 8, 256), given_machine(1, 24, 32)
    with pytest.raises(UsageError, match=r"; what fits: --set max_length=2496 or the recipe llama3_70b_qlora$"):
        find("llama3_70b_lora", (), small)
    assert find("llama3_70b_lora", ("max_length=2496",), small).plan.fits
    assert find("llama3_70b_qlora", (), small).plan.fits
    with pytest.raises(UsageError, match=r"what fits: the recipe llama3_70b_qlora or 1082 GiB of free RAM$"):
        find("llama3_70b_full", ("profile.optimizer_state=fp32",), given_machine(2, 24, 64))
    with pytest.raises(UsageError, match=r"needs 42\.4 GiB of 32\.0, 10\.4 too little; what fits: 43 GiB of free"):
        find("llama3_70b_qlora", (), ram)
    assert find("llama3_70b_qlora", (), given_machine(1, 24, 43)).plan.fits
    with pytest.raises(UsageError, match=r"what fits: 43 GiB of free RAM$"):
        find("llama3_70b_qlora", (), given_machine(1, 24, 42))
    with pytest.raises(UsageError, match=r"what fits: --set profile.micro_batch=2 or"):
        find("llama3_8b_qlora", ("profile.micro_batch=8", "profile.kept_layers=32"), given_machine(1, 24, 64))
    taken = Machine((Gpu("NVIDIA GeForce RTX 4090", 24, 2),), 64, 60)
    with pytest.raises(UsageError, match=r"not fit 1 GPU with 2\.0 GiB free \(of 24\.0, others use the rest\) and"):
        find("llama3_8b_qlora", (), taken)


def test_a_recipe_is_proposed_where_it_fits_with_all_that_is_set():
    small, long = given_machine(1, 7, 256), ("max_length=8192",)
    with pytest.raises(UsageError, match=r"; what fits: the recipe llama3_70b_qlora$"):
        find("llama3_70b_lora", (), small)
    with pytest.raises(UsageError) as refused:
        find("llama3_70b_lora", long, small)
    assert "the recipe" not in str(refused.value)
    with pytest.raises(UsageError, match="does not fit"):
        find("llama3_70b_qlora", long, small)


def test_plan_searches_for_a_machine_that_is_given_as_for_this_one():
    """Weights in RAM are found without a word of them; --find lists what else was tried."""
    flags = ["plan", "llama3_70b_qlora", "--gpus", "1", "--gpu-memory", "24", "--host-memory", "64"]
    planned, with_all = (CliRunner().invoke(cli, [*flags, *more]).output for more in ([], ["--find"]))
    assert "fits\n" in planned and "chosen      1 GPU, weights in RAM" in planned and "tried, the best" not in planned
    assert planned.splitlines()[:8] == with_all.splitlines()[:8] and "tried, the best of each kind" in with_all


def test_without_gpus_a_tiny_model_gets_the_profile_of_the_cpu(tmp_path):
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
              "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 512}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run = find("tiny_qlora", (f"base.model={tmp_path}",), Machine((), 64, 60), output=str(tmp_path / "run")).plan.run
    assert run.profile_name == "cpu_2proc" and run.accelerate.use_cpu and run.folder == tmp_path / "run"
    assert (run.folder / run.working_folder).resolve() == Path.cwd(), "run.yaml is read from other folders, too"


WHY_NOT = {
    (
        "llama3_70b_qlora",
        "fsdp_offload_4gpu",
    ): "the 2024 tier as it was: 8 % shorter steps, 44 GiB of RAM",
    ("llama3_70b_qlora", "fsdp_1x48gb"): "as good: layers' inputs in RAM in place of the embedding, steps 1 % shorter",
    ("llama3_8b_lora", "fsdp_offload_4gpu"): "likewise: less than the prediction may be off",
    ("llama3_70b_qlora", "fsdp_offload_1x80gb"): "for full and lora; QLoRA fits the card without the RAM",
    ("llama3_8b_full", "fsdp_offload_1x80gb"): "float32 states; small ones fit the card without the RAM",
    ("llama3_8b_qlora", "single_gpu_8gb"): "leaves 11 of 16 GiB of RAM to others, for steps 13 % longer",
    ("llama3_8b_lora", "fsdp_1x48gb"): "embedding_offload is for 70B, and 8B gets it along",
    ("llama3_8b_qlora", "fsdp_1x48gb"): "embedding_offload is for 70B, and 8B gets it along",
}
"Presets that are not what the search finds for their hardware, and why they are there."


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_preset_is_what_the_search_finds_for_its_hardware_or_says_why_not(recipe):
    for run in preset_runs(recipe, runs.load_recipe(recipe)):
        profile, machines = run.profile, run.accelerate.num_machines
        if not profile.num_gpus:
            continue
        preset = make_plan(filled(run, limits_of(run)), limits_of(run))
        machine = given_machine(profile.num_gpus // machines, profile.gpu_memory_gib, profile.host_memory_gib)
        found = find(recipe, (), machine, machines=machines)
        is_found = chosen(found.plan) == chosen(preset)
        assert is_found != ((recipe, run.profile_name) in WHY_NOT), (run.profile_name, found.in_one_line())


@pytest.mark.parametrize(("key", "gib"), [("gpu_memory_gib", 10), ("host_memory_gib", 20)])
def test_memory_that_is_set_is_all_that_is_taken(key, gib):
    """Without a profile, too: of what there is no more."""
    machine = given_machine(1, 24, 64)
    free, held = (find("llama3_8b_qlora", sets, machine).plan for sets in ((), (f"profile.{key}={gib}",)))
    limits = held.limits
    assert (limits.gpu if key.startswith("gpu") else limits.host) == gib and held.fits
    more = find("llama3_8b_qlora", (f"profile.{key}=500",), machine).plan
    assert chosen(more) == chosen(free) and more.limits == free.limits


def test_layers_are_kept_where_ram_for_their_inputs_is_short():
    """And what is said of the RAM that would do holds: with a GiB less nothing fits."""
    sets, short = ("profile.activation_offload=true",), given_machine(1, 8, 16)
    with pytest.raises(UsageError, match=r"what fits: .* GiB of free RAM") as refused:
        find("llama3_8b_lora", sets, short)
    enough = int(re.search(r"what fits: .*?(\d+) GiB of free RAM", str(refused.value)).group(1))
    assert find("llama3_8b_lora", sets, given_machine(1, 8, enough)).plan.setup.kept_layers > 0
    with pytest.raises(UsageError, match="does not fit"):
        find("llama3_8b_lora", sets, given_machine(1, 8, enough - 1))


def test_small_optimizer_states_are_for_full_fine_tuning_that_would_not_fit_or_be_far_slower():
    assert find("llama3_70b_full", (), given_machine(8, 80, 256)).plan.setup.small_states
    assert find("llama3_8b_full", (), given_machine(1, 80, 256)).plan.setup.small_states
    for recipe, machine in (
        ("llama3_8b_full", given_machine(4, 80, 256)),
        ("llama3_8b_lora", given_machine(1, 80, 64)),
    ):
        assert not find(recipe, (), machine).plan.setup.small_states
    assert not find("llama3_8b_full", ("training.optim=sgd",), given_machine(2, 48, 256)).plan.setup.small_states
    with pytest.raises(UsageError, match="does not fit"):
        find("llama3_70b_full", FP32, given_machine(8, 80, 256))


def test_optimizer_states_lie_in_ram_where_the_cards_are_too_small_for_them():
    small = find("llama3_8b_full", (), given_machine(1, 23, 60)).plan
    assert small.setup.optimizer_offload and small.setup.small_states and not small.setup.offload
    assert small.gpu.total <= 22 * 2**30 and sum(small.host[small.host_phase].values()) <= 60 * 2**30
    four = find("llama3_70b_full", (), given_machine(4, 80, 480)).plan
    assert four.setup.optimizer_offload and four.setup.ranks == 4
    assert sum(four.host[four.host_phase].values()) <= 460 * 2**30


def test_a_found_run_is_written_out_so_that_accelerate_starts_the_same(tmp_path):
    for count, recipe in ((3, "llama3_8b_qlora"), (1, "llama3_70b_qlora")):
        run = find(recipe, (), given_machine(count, 24, 64), output=str(tmp_path / str(count))).plan.run
        assert run.accelerate.path == str(tmp_path / str(count) / "accelerate.yaml")
        run.folder.mkdir()
        (run.folder / "accelerate.yaml").write_text(written_out(run.accelerate), encoding="utf-8")
        assert read_accelerate_config(run.folder / "accelerate.yaml") == run.accelerate
        (run.folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
        assert runs.load(run.folder) == run
        moved = run.folder.rename(tmp_path / f"moved{count}")
        assert runs.load(moved).accelerate.path == str(moved / "accelerate.yaml")
    machines = find("llama3_70b_full", FP32, given_machine(8, 80, 512), machines=2, output=str(tmp_path / "m")).plan.run
    config = tmp_path / "two.yaml"
    config.write_text(written_out(machines.accelerate), encoding="utf-8")
    assert read_accelerate_config(config) == machines.accelerate.model_copy(update={"path": str(config)})
    assert (machines.accelerate.num_machines, machines.accelerate.num_processes) == (2, 16)


def test_a_preset_that_was_filled_elsewhere_is_typed_with_its_changes():
    recipe = runs.load_recipe("llama3_8b_qlora")
    [run] = [run for run in preset_runs("llama3_8b_qlora", recipe) if run.profile_name == "single_gpu"]
    assert as_typed(filled(run, limits_of(run))) == "single_gpu"
    elsewhere = filled(run, replace(limits_of(run), gpu=12.0))
    assert as_typed(elsewhere).startswith("single_gpu --set profile.")


def test_a_verdict_never_rounds_a_no_to_a_yes():
    assert str(Verdict("host RAM", 24.04, 24.0)) == "host RAM: needs 24.04 GiB of 24.00, 0.04 too little"
    assert str(Verdict("host RAM", 23.96, 24.0)) == "host RAM: needs 24.0 GiB of 24.0, 0.0 to spare"
    assert str(Verdict("host RAM", 30.0, 24.0)) == "host RAM: needs 30.0 GiB of 24.0, 6.0 too little"


def test_plan_find_and_train_show_what_was_chosen_tried_and_left_idle(monkeypatch):
    here = Machine((Gpu("NVIDIA GeForce RTX 4090", 24, 23.5),) * 5, 64, 60)
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: here)
    planned = CliRunner().invoke(cli, ["plan", "llama3_8b_qlora", "--find"])
    assert planned.exit_code == 0, planned.output
    trained = CliRunner().invoke(cli, ["train", "llama3_8b_qlora", "--dry-run", "--set", "data.prepared=nowhere"])
    assert trained.exit_code == 0, trained.output
    for output, chosen in ((planned.output, "chosen      "), (trained.output, "plan chose ")):
        assert f"{chosen}4 GPUs, a copy of the model on each" in output and "1 of 5 GPUs stays idle" in output
    assert "tried, the best of each kind first" in planned.output
    assert "num_processes: 4" in trained.output and "accelerate_config: accelerate.yaml" in trained.output
    flags = ["--gpus", "1", "--gpu-memory", "24", "--host-memory", "64"]
    nothing = CliRunner().invoke(cli, ["plan", "llama3_70b_full", "--find", *flags])
    assert nothing.exit_code == 2 and "small optimizer states in RAM" in nothing.stderr


def test_the_gpu_that_is_there_decides_what_is_fastest():
    fast, slow = (
        find("llama3_8b_qlora", ("profile.compute=fp8",), given_machine(1, 24, 64), gpu_model(name))
        for name in ("H200", "RTX 4090")
    )
    assert fast.plan.setup.micro_batch > slow.plan.setup.micro_batch  # a fast one waits for Python


def test_small_states_are_not_proposed_beside_weights_in_ram():
    """No search tries them there."""
    with pytest.raises(UsageError) as refused:
        find("llama3_70b_full", (), given_machine(1, 24, 1024))
    assert "weights in RAM" in str(refused.value) and "bf16_8bit" not in str(refused.value)


def test_what_is_set_and_cannot_be_together_is_named():
    machine = given_machine(8, 80, 512)
    with pytest.raises(
        UsageError, match=r"no way to train has all that is set: profile\.embedding_offload; leave one out"
    ):
        find("llama3_8b_full", ("profile.embedding_offload=true",), machine)
    with pytest.raises(UsageError, match="bf16_8bit is for method full, recipe llama3_8b_qlora is qlora"):
        find("llama3_8b_qlora", ("profile.optimizer_state=bf16_8bit",), machine)


def test_more_gpus_that_leave_too_little_memory_stay_idle_for_that():
    found = find("llama3_70b_qlora", ("profile.micro_batch=4",), given_machine(2, 24, 64), gpu_model("RTX 4090"))
    less_room = "less memory would be left than the prediction may be off"
    assert found.idle == 1 and less_room in found.why_idle() and less_room in found.next_best


def test_a_profile_that_is_proposed_fits_as_its_file_says():
    """Its own file states less memory than the one that was asked about has."""
    run = runs.resolve("llama3_70b_qlora", "fsdp_offload_1x24gb", ("profile.kept_layers=80",))
    plan = make_plan(filled(run, limits_of(run)), limits_of(run))
    [proposed] = [flags for flags in nearest_changes(plan) if "--profile" in flags]
    assert "kept_layers" not in proposed, "what fits in 24 GB"
    name = proposed.split()[1]
    other = runs.resolve("llama3_70b_qlora", name)
    assert make_plan(filled(other, limits_of(other)), limits_of(other)).fits
