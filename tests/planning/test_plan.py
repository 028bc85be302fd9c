"""What a plan says: sizes, memory, verdicts, the nearest change that fits, the matrix; and its place before `train`."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

from fitune.cli import cli
from fitune.config import run as runs
from fitune.config.model_shapes import LLAMA_3_FAMILY, find_shape
from fitune.config.shipped import PROFILES, RECIPES, names
from fitune.errors import UsageError
from fitune.launching.preflight import check_fits
from fitune.planning.fill import fits, resolve
from fitune.planning.head import head_lines
from fitune.planning.limits import Limits, limits_of
from fitune.planning.machine import Gpu, Machine
from fitune.planning.memory import MEASURED, disk, gpu_moments, gpu_peak, host_moments
from fitune.planning.outlook import (
    largest_micro_batch,
    longest_sequence,
    look_around,
    nearest_changes,
    refusal,
)
from fitune.planning.plan import ERROR, make_plan, setup_of
from fitune.planning.sizes import GIB
from fitune.planning.tiers import matrix


def plan_of(recipe="llama3_70b_qlora", profile="fsdp_4x24gb", *sets, limits=None, **options):
    run = resolve(recipe, profile, sets)
    return make_plan(run, limits or limits_of(run), **options)


def setup(recipe="llama3_70b_qlora", profile="fsdp_4x24gb", *sets):
    """One row a pass, everything recomputed, unless `sets` says otherwise."""
    run = resolve(recipe, profile, ("profile.micro_batch=1", "profile.kept_layers=0", *sets))
    return setup_of(run, find_shape(run.recipe.base.model))


# Sizes


@pytest.mark.parametrize(
    ("model", "billions"),
    [("meta-llama/Meta-Llama-3-8B", 8.03), ("meta-llama/Meta-Llama-3-70B-Instruct", 70.55),
     ("meta-llama/Llama-3.1-405B", 405.85), ("meta-llama/Llama-3.2-1B", 1.236),
     ("meta-llama/Llama-3.2-3B-Instruct", 3.213), ("meta-llama/Llama-3.3-70B-Instruct", 70.55),
     ("someone/Meta-Llama-3.1-8B-Instruct", 8.03)],
)  # fmt: skip
def test_the_table_of_models_has_the_published_parameter_counts(model, billions):
    assert find_shape(model).parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_local_config_is_read(tmp_path):
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 256,
              "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = find_shape(str(tmp_path))
    assert (shape.layers, shape.head_dim, shape.tied) == (3, 16, True)
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64
    assert shape.parameters == 3 * layer + 64 + 100 * 64


def test_sizes_are_those_of_transformers_models(tmp_path):
    """Biases, norms of heads, heads of another size."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 256}  # fmt: skip
    for kind, options in (
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
        ("mistral", {"head_dim": 8}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"head_dim": 16}),
    ):
        (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": kind} | options))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **options))
        shape = find_shape(str(tmp_path))
        assert shape.parameters == sum(p.numel() for p in model.parameters()), (kind, options)
        layer = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 1)
        assert shape.layer_vector_weights == layer, (kind, options)


def test_a_tied_model_trained_fully_has_one_embedding():
    shape, other = LLAMA_3_FAMILY["Llama-3.2-1B"], replace(LLAMA_3_FAMILY["Llama-3.2-1B"], tied=False)
    tied, untied = (replace(setup("llama3_8b_full", "fsdp_2x80gb"), shape=one) for one in (shape, other))
    embedding = shape.vocabulary * shape.hidden * 4
    for name, copies in ((tied, 1), (untied, 2)):
        assert gpu_moments(name)["save"]["embedding and head"] == copies * embedding / 2
    assert untied.trainable - tied.trainable == embedding / 4
    # gathered, with its gradient, as long as layers go backward
    more = shape.vocabulary * shape.hidden * 2
    for moment in ("backward, last layer", "backward, second layer"):
        assert gpu_moments(tied)[moment]["gradient of the embedding"] == more
        assert gpu_moments(tied)[moment]["unsharded head"] == more
        assert "gradient of the embedding" not in gpu_moments(untied)[moment]


def test_a_cached_config_is_found_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--llama" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--llama" / "refs").mkdir()
    (tmp_path / "models--some--llama" / "refs" / "main").write_text("abc")
    shape = LLAMA_3_FAMILY["Llama-3.2-1B"]
    (snapshot / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": 5, "num_attention_heads": 32, "vocab_size": 128256, "max_position_embeddings": 8192,
    }))  # fmt: skip
    assert find_shape("some/llama").layers == 5


# Memory


def test_weights_are_shared_among_ranks_and_statistics_are_not():
    one, four = setup(profile="fsdp_1x48gb"), setup()
    resident, shared = gpu_moments(one)["save"], gpu_moments(four)["save"]
    assert shared["sharded weights"] == pytest.approx(resident["sharded weights"] / 4)
    assert shared["quantisation statistics"] == resident["quantisation statistics"]
    weights = 80 * (855_638_016 / 2 + 2 * 8192 * 2) + 8192 * 2  # NF4 linears, bf16 norms
    assert resident["sharded weights"] == pytest.approx(weights)
    assert resident["quantisation statistics"] == pytest.approx(80 * 855_638_016 / 64 * (1 + 4 / 256))


@pytest.mark.parametrize(
    ("bytes_a_parameter", "changed", "sets"),
    [
        (14, {}, ()),
        (16, {"accumulation": 2}, ()),
        (16, {"replicas": 2}, ()),
        (16, {}, ("profile.reduce_dtype=fp32",)),
        (12, {}, ("training.optim=rmsprop",)),
    ],
)
def test_what_full_fine_tuning_takes(bytes_a_parameter, changed, sets):
    """Gradients are bf16 where AdamW takes them as ranks have added them up, and no other pass adds to them."""
    full = replace(setup("llama3_70b_full", "fsdp_full_16x80gb", *sets), **changed)
    step = gpu_moments(full)["optimizer step"]
    states = sum(step[name] for name in ("sharded weights", "embedding and head", "optimizer state", "gradients"))
    assert states * full.shards == pytest.approx(bytes_a_parameter * full.shape.parameters, rel=1e-4)


def test_adamw_of_what_is_offloaded_takes_its_pieces_and_page_locks_its_moments():
    streamed = setup("llama3_8b_full", "fsdp_offload_1x80gb")
    on_cpu = replace(streamed, streams_adamw=False)
    assert streamed.streams_adamw
    of_rmsprop = resolve("llama3_8b_full", "fsdp_offload_1x80gb", ("training.optim=rmsprop",))
    assert not of_rmsprop.streams_adamw and not resolve("tiny_lora", "cpu_2proc").streams_adamw
    grown = {phase: sum(parts.values()) for phase, parts in gpu_moments(streamed).items()}
    for phase, parts in gpu_moments(on_cpu).items():
        assert grown[phase] - sum(parts.values()) == (256 * 2**20 if phase == "optimizer step" else 0), phase
    here, there = host_moments(streamed), host_moments(on_cpu)
    assert here["load"] == there["load"]
    for phase in ("step", "save"):
        locked = here[phase]["page-locking"] - there[phase]["page-locking"]
        assert locked == pytest.approx(8 * streamed.trainable * MEASURED.page_lock), phase


def test_what_is_turned_on_moves_bytes_where_it_says():
    base = setup(profile="fsdp_1x48gb")
    offloaded = replace(base, offload=True)
    assert "sharded weights" not in gpu_peak(offloaded).components
    grown = host_moments(offloaded)["step"]["offloaded weights"] - host_moments(base)["step"]["offloaded weights"]
    assert grown == pytest.approx(80 * base.layer_weights)
    ends = [gpu_moments(replace(offloaded, accumulation=passes))["backward, embedding"] for passes in (1, 2)]
    stays = [end["unsharded layers"] for end in ends]
    assert stays == [0, offloaded.unsharded_layer], "the first layer, for the next pass"
    rows = host_moments(offloaded)["step"]["embedded rows"]
    assert rows == 2 * 64 * 2**20, "48 MiB of two passes, page-locked by powers of two"
    two = replace(offloaded, ranks=2)
    here, apart = (host_moments(replace(two, machines=n))["step"]["offloaded weights"] for n in (1, 2))
    assert apart == pytest.approx(here / 2), "RAM is that of one machine"
    kept = replace(base, kept_layers=base.shape.layers)
    assert gpu_peak(kept).total > gpu_peak(base).total + 35 * GIB
    activations = replace(base, activation_offload=True)
    in_backward = gpu_moments(activations)["backward, second layer"]
    assert in_backward["kept activations"] == 2 * 48 * 2**20, "of the layer that computes, and of the one before"
    assert host_moments(activations)["step"]["layers' inputs"] == pytest.approx(80 * 48 * 2**20 * 1.028)
    long_row = replace(activations, max_length=32_768)
    assert gpu_moments(long_row)["backward, second layer"]["kept activations"] == long_row.hidden_state
    some_kept = host_moments(replace(activations, kept_layers=20))["step"]["layers' inputs"]
    assert some_kept == pytest.approx(60 * 48 * 2**20 * 1.028), "those of kept layers stay"


def test_kept_attention_takes_its_heads_and_their_sums_in_each_layer_that_is_not_kept():
    base = replace(setup(profile="fsdp_1x48gb"), kept_layers=20)
    result = (48 + 64 * 4 * 3072 / 2**20) * 2**20  # 64 heads of 128 in bf16, and a float32 of each
    attention = replace(base, kept_attention=True)
    in_ram = replace(attention, activation_offload=True)
    for phase, layers in (("forward, loss", 60), ("backward, last layer", 60), ("backward, second layer", 1)):
        before, with_it = (sum(gpu_moments(one)[phase].values()) for one in (base, attention))
        assert with_it - before == pytest.approx(layers * result), phase
        without, moved = (sum(gpu_moments(replace(in_ram, kept_attention=on))[phase].values()) for on in (False, True))
        assert moved - without == pytest.approx(result * (phase == "backward, second layer")), "that of the next layer"
    assert host_moments(in_ram)["step"]["layers' inputs"] == pytest.approx(60 * (48 * 2**20 + result) * 1.028)


def test_more_of_anything_never_takes_less():
    base = replace(setup(), accumulation=1)
    changes = ({"micro_batch": 2}, {"max_length": 4096}, {"lora_r": 64}, {"accumulation": 4}, {"kept_layers": 40})
    for change in changes:
        assert gpu_peak(replace(base, **change)).total > gpu_peak(base).total, change
    assert gpu_peak(replace(base, ranks=8)).total < gpu_peak(base).total


def test_disk_holds_one_checkpoint_more_than_are_kept():
    lora = setup().trainable
    assert disk(setup(), 2)["checkpoints"] == 3 * lora * 12
    full = setup("llama3_70b_full", "fsdp_full_16x80gb")
    assert disk(full, 1)["checkpoints"] == 2 * full.trainable * 12


# Verdicts and changes


def test_a_run_needs_room_for_its_checkpoints_its_result_and_the_download():
    run = resolve("llama3_70b_qlora", "fsdp_4x24gb", ("training.save_total_limit=2",))
    space = make_plan(run, limits_of(run)).disk
    needed = {"disk": space["checkpoints"] + space["result"], "download_disk": space["download"]}
    assert min(space["checkpoints"], space["result"], space["download"]) > 0
    for name, size in needed.items():
        for room, fitting in ((1.01, True), (0.99, False)):
            limits = replace(limits_of(run), **{name: size * room / GIB})
            assert make_plan(run, limits).fits is fitting, (name, room)


def test_a_plan_that_fits_says_by_how_much():
    plan = plan_of()
    assert plan.fits and not look_around(plan).changes and refusal(plan) is None
    [gpu] = [verdict for verdict in plan.verdicts if verdict.resource == "GPU memory"]
    assert f"{gpu.has - gpu.needs:.1f} to spare" in str(gpu)


def test_the_nearest_changes_really_fit():
    on_gpu = ("profile.micro_batch=2", "profile.kept_layers=0", "profile.activation_offload=false")
    plan = plan_of("llama3_70b_qlora", "fsdp_4x24gb", *on_gpu)
    assert not plan.fits
    changes = look_around(plan).changes
    assert changes[0] == "--set profile.micro_batch=1"
    for change in changes:
        words = change.split()
        sets = [value for flag, value in pairwise(words) if flag == "--set"]
        profile = words[words.index("--profile") + 1] if "--profile" in words else "fsdp_4x24gb"
        if "--profile" not in words:
            sets = [*on_gpu, *sets]
        changed = resolve("llama3_70b_qlora", profile, tuple(sets))
        assert make_plan(changed, plan.limits).fits, change
    assert "does not fit" in refusal(plan) and "nearest change that fits: --set profile.micro_batch=1" in refusal(plan)


def test_two_settings_are_combined_where_one_is_not_enough():
    plan = plan_of(limits=Limits(gpu=16.9, host=64, gpus=4))
    [first, *_] = nearest_changes(plan)
    assert first.count("--set") == 2


def test_what_nothing_can_fit_is_said():
    plan = plan_of(limits=Limits(gpu=3, host=8, gpus=4))
    assert look_around(plan).changes == [] and "no change of one or two settings" in refusal(plan)


def test_gpus_that_are_missing_cannot_be_forced(monkeypatch):
    here = Limits(gpu=24, host=64, gpus=2)
    instead = "nearest change that fits: --profile fsdp_offload_2x24gb; without --profile, `train` and `plan` find"
    assert f"GPUs: needs 4, has 2; {instead}" in refusal(plan_of(limits=here))
    waits = "profile.async_save=false"
    seven = plan_of("llama3_70b_full", "fsdp_full_8x80gb", waits, limits=Limits(gpu=80, host=256, gpus=7))
    assert "GPUs: needs 8, has 7; without --profile, `train` and `plan` find what is fastest on" in refusal(seven)
    run = resolve("llama3_70b_qlora", "fsdp_4x24gb")
    for limits, can_be_forced in ((here, False), (Limits(gpu=3, host=8, gpus=4), True)):
        monkeypatch.setattr("fitune.planning.limits.limits_for_training", lambda _, limits=limits: limits)
        with pytest.raises(UsageError) as refused:
            check_fits(run)
        assert str(refused.value).endswith("--force trains anyway") == can_be_forced


def test_largest_batch_and_longest_sequence_are_the_largest():
    planned, limits = setup(profile="fsdp_offload_2x24gb"), Limits(24, 64, 2)
    rows, tokens = largest_micro_batch(planned, limits, 16), longest_sequence(planned.of_rows(1, 16), limits)
    assert rows >= 1 and fits(planned.of_rows(rows, 16), limits)
    assert not fits(planned.of_rows(rows + 1, 16), limits)
    assert tokens % 64 == 0 and tokens <= planned.shape.max_positions
    small = Limits(10, 64, 2)
    one_row = planned.of_rows(1, 16)
    tokens = longest_sequence(one_row, small)
    assert 0 < tokens < planned.shape.max_positions
    assert not fits(replace(one_row, max_length=tokens + 64), small)


def test_a_pass_of_more_rows_may_take_less_than_several_of_one():
    """Of method full, whose passes add up float32 gradients: what fits is found, and what is said of it holds."""
    sets = ("global_batch_size=64", "profile.gpu_memory_gib=75")
    run = resolve("llama3_70b_full", "fsdp_full_16x80gb", sets)
    plan = make_plan(run, limits_of(run))
    assert plan.fits and (plan.setup.micro_batch, plan.setup.accumulation) == (4, 1)
    one_row = resolve("llama3_70b_full", "fsdp_full_16x80gb", (*sets, "profile.micro_batch=1"))
    refused = make_plan(one_row, limits_of(one_row))
    assert not refused.fits and "--set profile.micro_batch=4" in nearest_changes(refused)
    outlook = look_around(plan)
    assert outlook.largest_micro_batch >= 4 and outlook.longest_sequence == 0
    [said] = [line.text for line in head_lines(plan, outlook, [], None) if line.label == "at most"]
    assert "rows of 3,072 tokens a pass (no layer kept" in said and "or one of" not in said


def test_states_beside_weights_in_ram_are_not_proposed_in_ram_once_more():
    run = resolve("llama3_8b_full", "fsdp_offload_1x80gb", ("profile.host_memory_gib=100",))
    changes = nearest_changes(make_plan(run, limits_of(run)))
    assert changes and not any("optimizer_offload" in change for change in changes)


def test_a_named_gpu_that_has_the_machines_ram_for_its_memory_has_it_once():
    said = CliRunner().invoke(cli, ["plan", "llama3_8b_full", "--gpu", "GB10"]).output
    assert "memory of CPU and GPU  fits: needs" in said and "of 119.0" in said and "host RAM  " not in said
    refused = CliRunner().invoke(cli, ["plan", "llama3_70b_lora", "--gpu", "GB10"])
    assert refused.exit_code == 2 and "memory of CPU and GPU: needs" in refused.stderr


def test_profiles_for_such_a_card_are_named_before_those_for_larger_ones():
    plan = make_plan(resolve("llama3_8b_qlora", "single_gpu"), Limits(8, 16, 1))
    assert nearest_changes(plan)[-1] == "--profile single_gpu_8gb"


def test_the_matrix_has_every_profile_with_gpus_and_every_method():
    rows = {row["profile"]: row["methods"] for row in matrix("llama3_70b_qlora", ())}
    assert set(rows) == {name for name in names(PROFILES) if runs.load_profile(name).num_gpus}
    assert rows["single_gpu_8gb"]["full"]["why_not"] == "embedding_offload is for a frozen base"
    assert rows["fsdp_full_16x80gb"]["qlora"]["idle_gpus"] == 8  # eight rows a step
    assert rows["fsdp_4x24gb"]["qlora"]["fits"] and not rows["fsdp_4x24gb"]["full"]["fits"]
    assert "GPU memory" in rows["fsdp_4x24gb"]["lora"]["short_of"]
    assert 0.9 * 48 < rows["fsdp_4x48gb"]["qlora"]["peak_gpu_gib"] <= 48 / (1 + ERROR)
    assert rows["fsdp_4x48gb"]["lora"]["fits"] and rows["fsdp_4x48gb"]["lora"]["micro_batch"] == 2


def test_the_matrix_of_a_file_is_that_of_the_shipped_recipe(tmp_path):
    file = shutil.copy(RECIPES / "llama3_8b_qlora.yaml", tmp_path / "mine.yaml")
    assert matrix(str(file), ()) == matrix("llama3_8b_qlora", ())


# Before training


def test_train_refuses_what_cannot_fit_and_force_overrides(monkeypatch, tmp_path):
    from fitune.launching import preflight

    run = resolve("llama3_70b_qlora", "fsdp_4x24gb", output=str(tmp_path / "run"))
    small = Machine((Gpu("NVIDIA GeForce RTX 4080", 16, 15.5),) * 4, 64, 60)
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: small)
    monkeypatch.delenv("FITUNE_GPU_CAP_GIB", raising=False)
    with pytest.raises(UsageError, match=r"does not fit: GPU memory: needs 2\d.* of 15.5.*--force"):
        preflight.check_fits(run)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(preflight, "local_config", lambda *_: tmp_path)
    prepared = tmp_path / "data"
    prepared.mkdir()
    for split in ("train", "test"):
        (prepared / f"{split}.jsonl").write_text("")
    recipe = run.recipe.model_copy(update={"data": run.recipe.data.model_copy(update={"prepared": str(prepared)})})
    run = run.model_copy(update={"recipe": recipe})
    with pytest.raises(UsageError, match="does not fit"):
        preflight.check_before_training(run)
    preflight.check_before_training(run, force=True)
