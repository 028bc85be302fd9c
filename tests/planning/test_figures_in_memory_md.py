"""What docs/memory.md says that `plan` says, it says today, and what was measured is what the results say."""

import json
from dataclasses import replace
from statistics import median

import pytest
from pages import ROOT
from planned import SMALL, card_gib, gpu_gib, host_gib, one_line, planned, step, table, tensors_gib

from benchmarks import full_results
from fitune.config.model_shapes import find_shape
from fitune.planning.fill import ATTENTION_COUNTS_FROM, resolve
from fitune.planning.gpu_models import gpu_model
from fitune.planning.layer_backward import layer_backward
from fitune.planning.limits import given_machine
from fitune.planning.memory import gpu_moments, gpu_peak, host_moments
from fitune.planning.plan import setup_of
from fitune.planning.search import find
from fitune.planning.sizes import GIB, Setup
from fitune.planning.step_time import step_seconds
from fitune.planning.words import rounded

PAGE = one_line("memory.md")
RUNS = {(entry["date"], entry["name"]): entry for entry in full_results.full_runs()}
"The last file's, where a run was repeated on the same day."
TENSORS, CARD = "GiB of tensors, `plan`", "all of the card, `plan`"


def gib(size: float, digits: int = 1) -> str:
    return f"{size / GIB:.{digits}f}"


def row_of(name: str, *columns: str) -> dict[str, str]:
    """The row of a table with these columns that has this name in the first of them."""
    [row] = [row for row in table("memory.md", *columns) if row[columns[0]] == name]
    return row


def assert_as_measured(row: dict[str, str], entry: dict) -> None:
    assert row["measured"] == f"{entry['peak_allocated_gib']:.1f}"
    assert row["tokens/s, median"] == f"{entry['median_tokens_per_second']:,}"
    assert row["rows a pass, layers kept"] == f"{entry['micro_batch']}, {entry['kept_layers']}"


def setup_of_28_november(name: str) -> Setup:
    return full_results.setup_of_full_run(RUNS["2026-11-28", name])


def _long_rows(name: str, date: str = "2026-11-28") -> Setup:
    file = ROOT / "benchmarks" / "results" / f"longest-rows-{name}-h200-{date}.json"
    [entry] = json.loads(file.read_text(encoding="utf-8"))["runs"]
    size = entry["model"].split("-")[0]
    numbers = ("profile.micro_batch", "profile.kept_layers", "profile.activation_offload", "profile.embedding_offload")
    taken = {key: entry["set"][key] for key in (*numbers, "lora.r") if key in entry["set"]}
    taken |= {"base.model": f"meta-llama/Llama-3.1-{size.upper()}", "global_batch_size": 1}
    taken |= {"profile.kept_attention": entry.get("kept_attention", False)}
    profile = {"8b": "single_gpu", "70b": "fsdp_1x48gb"}[size]
    setup = planned(f"llama3_{size}_qlora", profile, tuple(f"{key}={value}" for key, value in taken.items())).setup
    return replace(setup, max_length=entry["tokens"])  # which may be beyond the model's positions


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("21.3 GiB for torch (`full_1x24gb`)", "8b, 24 GB"),
        ("44 GiB for torch (`full_1x48gb`)", "8b, 48 GB"),
        ("3B, 21.7 GiB for torch (`full_1x24gb`)", "3b, 24 GB"),
    ],
)
def test_8b_in_full_on_cards_of_given_sizes(card, name):
    entry, row = RUNS["2026-11-29", name], row_of(card, "card", TENSORS)
    assert row[TENSORS] == tensors_gib(full_results.setup_of_full_run(entry))
    assert_as_measured(row, entry)


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("8B, 22.2 GiB for torch (24 GB)", "8b, 24 GB, two rows"),
        ("8B, in memory", "8b, in memory, two rows"),
        ("1B, 10.4 GiB for torch (12 GB)", "1b, 12 GB"),
    ],
)
def test_models_in_full_on_cards_of_given_sizes(card, name):
    entry, row = RUNS["2026-11-28", name], row_of(card, "model, card", CARD)
    setup = full_results.setup_of_full_run(entry)
    assert (row[TENSORS], row[CARD]) == (tensors_gib(setup), card_gib(setup))
    assert row["needed"] == f"{full_results.card_gib(entry)[0]:.1f}"
    assert_as_measured(row, entry)


def test_the_step_of_1b():
    seconds = step_seconds(setup_of_28_november("1b, 12 GB"), gpu_model("H200"))["total"]
    assert f"it expects {seconds:.2f} s a step" in PAGE


@pytest.mark.parametrize("states", ["bf16_8bit", "fp32"])
def test_small_and_float32_states_of_8b(states):
    entry, row = RUNS["2026-11-27", states], row_of(f"`{states}`", "states", "reserved")
    assert row["GiB that `plan` says, all of the card"] == card_gib(full_results.setup_of_full_run(entry))
    assert row["tensors"] == f"{entry['peak_allocated_gib']:.1f}"
    assert row["reserved"] == f"{entry['peak_reserved_gib']:.1f}"
    assert row["tokens/s, median"] == f"{entry['median_tokens_per_second']:,}"


def test_70b_in_full_on_four_gpus():
    setup = full_results.setup_of_full_run(RUNS["2026-11-27", "four_h200"])
    assert f"says {step_seconds(setup, gpu_model('H200'))['total']:.1f} s of it" in PAGE
    now = planned("llama3_70b_full", "fsdp_full_4x141gb")
    rows, passes = now.setup.micro_batch, now.setup.accumulation
    assert (rows, passes) == (4, 1)
    assert f"It now takes four rows in one pass and expects {step(now)}" in PAGE


def test_70b_in_full_on_eight_cards_is_extrapolated_from_two():
    """A straight line through both depths; plan's difference of GPUs, passes and kept layers."""
    depths = [f"70b, {layers} layers, 2 GPUs" for layers in (10, 20)]
    ten, twenty = (RUNS["2026-11-28", depth] for depth in depths)
    less, more = (setup_of_28_november(depth) for depth in depths)
    eight = planned("llama3_70b_full", "fsdp_full_8x80gb")
    rows = [list(row.values()) for row in table("memory.md", "layers", "tensors, `plan`", CARD)]
    for row, entry, setup in zip(rows, (ten, twenty), (less, more), strict=False):
        needed, kept = full_results.card_gib(entry)
        measured, needed, kept = (f"{size:.1f}" for size in (entry["peak_allocated_gib"], needed, kept))
        assert row[3:] == [tensors_gib(setup), measured, card_gib(setup), needed, kept]
    a_layer = (gpu_peak(more).allocated - gpu_peak(less).allocated) / 10 / GIB
    took = (twenty["peak_allocated_gib"] - ten["peak_allocated_gib"]) / 10
    assert rows[2][3:5] == [f"{a_layer:.3f}", f"{took:.3f}"]
    assert (rows[3][3], rows[3][5]) == (tensors_gib(eight.setup), gpu_gib(eight))
    extrapolated = (gpu_peak(eight.setup).allocated - gpu_peak(more).allocated) / GIB
    expected = [size + extrapolated for size in (twenty["peak_allocated_gib"], *full_results.card_gib(twenty))]
    assert [rows[3][column] for column in (4, 6, 7)] == [f"{size:.1f}" for size in expected]
    fewer = planned("llama3_70b_full", "fsdp_full_8x80gb", ("profile.kept_layers=8",))
    less = (eight.gpu.total - fewer.gpu.total) / GIB
    assert f"`--set profile.kept_layers=8` takes {less:.1f} GiB less" in PAGE


def test_70b_in_full_with_states_in_host_ram():
    entry = RUNS["2026-11-28", "70b, 80 layers, 4x80 GB, offloaded"]
    setup, (needed, _) = full_results.setup_of_full_run(entry), full_results.card_gib(entry)
    columns = ("GiB of tensors", "GiB of RAM, processes", "rows a pass, layers kept", "tokens/s per GPU")
    said, took = (list(row.values())[1:] for row in table("memory.md", *columns))
    in_ram = max(sum(parts.values()) for phase, parts in host_moments(setup).items() if phase != "save") / GIB
    seconds = step_seconds(setup, gpu_model("H200"))["total"]
    rows = f"{setup.micro_batch}, {setup.kept_layers}"
    assert said == [rows, tensors_gib(setup), card_gib(setup), f"{in_ram:.1f}", f"{seconds:.1f}", ""]
    card = f"{entry['peak_by_nvidia_smi_gib']}; {needed:.1f} needed"
    speed = entry["median_tokens_per_second_per_gpu"]
    measured = [entry["peak_allocated_gib"], entry["peak_host_rss_sum_gib"], median(entry["step_seconds"])]
    tensors, ram, seconds = (f"{number:.1f}" for number in measured)
    assert took == [rows, tensors, card, ram, seconds, str(speed)]
    in_memory = RUNS["2026-11-27", "four_h200"]["median_tokens_per_second_per_gpu"]
    assert f"That is {speed / in_memory:.2f} of the {in_memory} tokens/s in memory" in PAGE


def test_the_loss_of_70b_going_backward():
    plan = planned("llama3_70b_full", "fsdp_full_16x80gb")
    assert plan.gpu.phase == "backward, loss" and plan.setup.kept_layers == 16
    parts = plan.gpu.components
    stored = sum(parts[name] for name in ("sharded weights", "embedding and head", "optimizer state"))
    rest = {
        "activations of 16 layers, and the others' inputs": ("kept activations",),
        "the loss": ("loss workspace", "hidden states"),
        "the head in bf16, gathered, and a layer, which FSDP prefetches": ("unsharded head", "gather buffers"),
        "holes in the allocator, CUDA, NCCL, workspaces": (
            "allocator slack", "context, kernels, NCCL", "cuBLAS workspace",
        ),
    }  # fmt: skip
    found = {row[""]: row["GiB"] for row in table("memory.md", "", "GiB")}
    assert found == {text: gib(sum(parts[name] for name in names)) for text, names in rest.items()}
    assert stored * 16 == pytest.approx(12 * plan.setup.shape.parameters, rel=1e-4)
    assert f"{stored * 16 / GIB:,.0f} GiB, {gib(stored)} on each of 16 GPUs." in PAGE
    assert f"they are not there yet. The rest of the {gpu_gib(plan)} then:" in PAGE and plan.setup.gradient == 2


def test_the_formulas():
    """Of one row a pass, no layer kept; as far as they are no part of another."""
    s = planned("llama3_70b_qlora", "fsdp_4x24gb", ("profile.micro_batch=1", "profile.kept_layers=0")).setup
    parts = gpu_moments(s)["forward, loss"]
    h, i, tokens = s.shape.hidden, s.shape.intermediate, s.tokens
    of_a_layer = tokens * (10.5 * h + 6 * i) + 2 * h * i
    assert layer_backward(s) == pytest.approx(of_a_layer, rel=0.01)
    of_the_loss = min(tokens, 1024) * 2 * s.shape.vocabulary + 4 * tokens * h
    assert parts["loss workspace"] == of_the_loss
    lora = sum(parts[name] for name in ("LoRA weights", "gradients", "optimizer state"))
    said = {
        "NF4 weights, sharded": gib(parts["sharded weights"], 2),
        "NF4 statistics, whole on every GPU, even when weights are offloaded": gib(parts["quantisation statistics"], 2),
        "embedding and head, bf16, sharded": gib(parts["embedding and head"], 2),
        "LoRA: weights, gradients, AdamW": gib(lora, 2),
        "kept activations: each layer's input": gib(parts["kept activations"], 2),
        "the head, gathered for the loss, and the buffer it is gathered through": gib(2 * s.gathered_head, 2),
        "a layer's weights, gathered, and the next one's; where gathered weights are kept, all layers'":
            f"{gib(s.gathered_layer, 2)} to {gib(2 * s.gathered_layer, 2)}",
        "one layer's backward pass, all recomputed": gib(layer_backward(s)),
        "loss: a tile of logits, gradients of the hidden states": gib(of_the_loss),
    }  # fmt: skip
    rows = table("memory.md", "what", "bytes")
    assert {row["what"]: row["70B QLoRA on 4 GPUs, GiB"] for row in rows} == said


def test_gathered_weights_that_stay():
    bf16 = planned("llama3_8b_lora", "fsdp_1x48gb").setup
    nf4 = planned("llama3_8b_qlora", "single_gpu").setup
    all_layers = [setup.shape.layers * setup.gathered_layer for setup in (bf16, nf4)]
    assert f"8B {gib(all_layers[0], 0)} GiB in bf16, {gib(all_layers[1])} in NF4" in PAGE
    full = find("llama3_8b_full", ("global_batch_size=8",), given_machine(4, 80, 512), gpu_model("H200")).plan
    freed = replace(full.setup, reshard=True)
    assert not full.setup.reshard
    seconds = [f"{step_seconds(setup, gpu_model('H200'))['total']:.2f} s" for setup in (full.setup, freed)]
    memory = [gib(gpu_peak(setup).total, 0) for setup in (full.setup, freed)]
    said = f"step, takes {seconds[0]} in place of {seconds[1]} and {memory[0]} GiB in place of {memory[1]}"
    assert said in PAGE
    cards, gpu = given_machine(8, 48, 512), gpu_model("RTX A6000")
    one_copy = find("llama3_8b_lora", ("profile.replicas=1",), cards, gpu).plan
    found = find("llama3_8b_lora", (), cards, gpu).plan
    assert not one_copy.setup.reshard and (one_copy.setup.ranks, found.setup.replicas) == (8, 8)
    freed = step_seconds(replace(one_copy.setup, reshard=True), gpu)["total"]
    assert f"between them, takes {step(one_copy)} in place of {rounded(freed)} s, and with a copy on each" in PAGE
    assert f"with a copy on each, as `plan` has it there, {step(found)}." in PAGE


def test_kept_layers_and_long_rows():
    kept = planned("llama3_8b_qlora", "single_gpu", ("profile.micro_batch=2", "profile.kept_layers=24"))
    assert f"`plan` says {tensors_gib(kept.setup)}." in PAGE
    on_12, on_48 = (_long_rows(name) for name in ("8b-12gb", "70b-48gb"))
    assert f"where `plan` says {tensors_gib(on_12)} (" in PAGE
    assert f"`plan` says {card_gib(on_48)} for the whole card" in PAGE
    on_80 = [_long_rows(f"{size}-80gb", "2026-11-29") for size in ("70b", "8b")]
    assert f"`plan` says {' and '.join(map(tensors_gib, on_80))}. Their inputs took" in PAGE
    assert f"took {' and '.join(gib(setup.inputs_in_host_ram, 0) for setup in on_80)} GiB of host" in PAGE


def test_kept_attention_of_long_rows():
    h200 = gpu_model("H200")

    def on_80_gb(*sets: str) -> Setup:
        rows = ("base.model=meta-llama/Llama-3.1-8B", "max_length=32768", "global_batch_size=2")
        run = resolve("llama3_8b_qlora", "single_gpu", (*rows, "profile.gpu_memory_gib=80", *sets), gpu=h200)
        return setup_of(run, find_shape(run.recipe.base.model))

    found, without = on_80_gb(), on_80_gb("profile.kept_attention=false")
    seconds, seconds_without = (rounded(step_seconds(s, h200)["total"]) for s in (found, without))
    layers = f"it then keeps {found.kept_layers} layers in place of {without.kept_layers}"
    assert f"{layers} and estimates {seconds} s in place of {seconds_without}." in PAGE
    assert f"where examples have {ATTENTION_COUNTS_FROM:,} tokens or more" in PAGE and found.micro_batch == 1


def test_70b_lora_on_four_and_on_eight():
    sets = ("profile.micro_batch=1", "profile.kept_layers=56", "profile.activation_offload=false")
    four = planned("llama3_70b_lora", "fsdp_4x48gb", sets).setup
    assert f"`plan` says {tensors_gib(four)} (`benchmarks/results/peers-h200x4-2026-11-28.json`)" in PAGE
    eight = planned("llama3_70b_lora", "fsdp_lora_8x80gb", ("profile.micro_batch=1", "profile.kept_layers=0")).setup
    assert f"all 80 allocate {tensors_gib(eight)} GiB on each, what `plan` says" in PAGE


def test_gradients_and_checkpoints_of_adapters():
    small, large = planned("llama3_8b_qlora", "single_gpu").setup, planned("llama3_70b_qlora", "fsdp_4x24gb").setup
    whole = [gib(setup.trainable * 4, 2) for setup in (small, large)]
    assert f"{whole[0]} GiB for 8B at r 16, {whole[1]} for 70B" in PAGE
    assert f"{gib(large.trainable * 12)} GiB for a 70B adapter" in PAGE


def test_full_fine_tuning_in_memory_md():
    eight = planned("llama3_70b_full", "fsdp_full_8x80gb")
    assert f"For eight 80 GB cards (`fsdp_full_8x80gb`) `plan` expects {gpu_gib(eight)} GiB" in PAGE
    for recipe, profile in (
        ("llama3_8b_full", "full_1x24gb"),
        ("llama3_8b_full", "full_1x48gb"),
        ("llama3_70b_full", "fsdp_offload_full_4x80gb"),
    ):
        plan = planned(recipe, profile)
        assert f"| `{recipe}` | `{profile}` | {gpu_gib(plan)} | {host_gib(plan)} | estimate |" in PAGE


@pytest.mark.parametrize(
    ("row", "sets"),
    [
        ("AdamW, float32 | 14", ()),
        ("RMSprop or Adagrad, float32 | 12", ("training.optim=rmsprop",)),
        ("RMSprop or Adagrad, float32 | 12", ("training.optim=adagrad",)),
        ("AdamW, `bf16_8bit` | 6.03", SMALL),
    ],
)
def test_optimizer_states_of_70b(row, sets):
    one_row = ("profile.micro_batch=1", "profile.kept_layers=0")
    setup = planned("llama3_70b_full", "fsdp_full_16x80gb", (*one_row, *sets)).setup
    ranks = (replace(setup, ranks=cards, machines=1, replicas=1, accumulation=1) for cards in (8, 12, 16, 24))
    said = " | ".join(f"{gpu_peak(setup).total / GIB:.1f}" for setup in ranks)
    assert f"| {row} | {said} |" in PAGE
