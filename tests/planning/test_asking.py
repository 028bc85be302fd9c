"""How `generate` and `eval` hold a model's folder on a machine, and how `plan` says it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from fitune.cli import cli
from fitune.config.accelerate_config import read_accelerate_config
from fitune.config.model_shapes import LLAMA_3_FAMILY
from fitune.errors import UsageError
from fitune.planning.asked_folder import AskedFolder, asked_folder
from fitune.planning.asking import choose, holdings
from fitune.planning.hardware import this_machine
from fitune.planning.limits import given_machine
from fitune.planning.machine import Gpu, Machine
from fitune.training.model_run import write_processes

SHAPE_70B = LLAMA_3_FAMILY["Llama-3.3-70B"]
MODEL_70B = AskedFolder(SHAPE_70B)
CONFIG_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip


@pytest.fixture
def folder_70b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_70B))
    return tmp_path


@pytest.mark.parametrize(
    ("gpus", "gib", "host", "asked", "measured"),
    [
        (2, 140, 64, "weights as stored, on 1 GPU", "weights as stored, on 1 GPU"),
        (1, 47.4, 64, "weights in NF4, on 1 GPU", "weights in NF4, on 1 GPU"),
        (4, 79, 64, "weights in NF4, on 1 GPU", "weights as stored, on 3 GPUs"),
        (4, 23.6, 64, "weights in NF4, on 3 GPUs", "weights in NF4, on 3 GPUs"),
        (1, 23.6, 64, *["weights in NF4, on 1 GPU, from host RAM layer by layer"] * 2),
        (1, 23.6, 256, *[f"weights {w}, on 1 GPU, from host RAM layer by layer" for w in ("in NF4", "as stored")]),
    ],
)
def test_a_70b_is_asked_the_fastest_way_and_measured_as_it_is_where_that_fits(gpus, gib, host, asked, measured):
    machine = given_machine(gpus, gib, host)
    assert str(choose(MODEL_70B, machine)) == asked
    assert str(choose(MODEL_70B, machine, exact=True)) == measured


def test_the_weights_alone_are_what_a_way_needs_at_least():
    stored, nf4 = SHAPE_70B.parameters * 2 / 2**30, SHAPE_70B.parameters * 0.516 / 2**30
    for way in holdings(MODEL_70B, 4):
        weights = stored if way.load == "stored" else nf4
        assert (way.host if way.offload else way.gpu * way.ranks) > weights
        assert not way.offload or way.gpu < 14, "what no GPU holds for long"


def test_load_allows_one_kind_of_weights():
    machine = given_machine(1, 79, 256)
    assert choose(MODEL_70B, machine, "stored").load == "stored"
    with pytest.raises(UsageError, match="its weights are in 4 bits already: leave out --load stored"):
        choose(AskedFolder(replace(SHAPE_70B, nf4_on_disk=True)), machine, "stored", name="models/mine")


@pytest.mark.parametrize(
    ("free", "taken"),
    [
        ((47.4, 47.4), "weights in NF4, on 1 GPU"),
        ((12.0, 47.4), "weights in NF4, on 1 GPU (1)"),
        ((23.6, 2.0, 23.6, 23.6), "weights in NF4, on 3 GPUs (0, 2, 3)"),
        ((2.0, 23.6), "weights in NF4, on 1 GPU (1), from host RAM layer by layer"),
    ],
)
def test_a_gpu_that_others_have_filled_is_left_to_them(free, taken, tmp_path):
    gpus = [Gpu("NVIDIA L40S", 48, gib, identity=f"GPU-{n}", shown_as=str(n)) for n, gib in enumerate(free)]
    way = choose(MODEL_70B, Machine(tuple(gpus), 64, 64))
    assert str(way) == taken
    started = write_processes(way, tmp_path)
    assert (started.gpu_ids or "").split(",") == [gpu.identity for gpu in way.cards] or not way.cards
    assert read_accelerate_config(Path(started.path)) == started


def test_a_card_that_is_tried_out_on_a_larger_one_is_asked_as_it_is(folder_70b, monkeypatch):
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: given_machine(1, 139, 64))
    ways = {}
    for cap in ("", "22"):
        monkeypatch.setenv("FITUNE_GPU_CAP_GIB", cap)
        ways[cap] = choose(MODEL_70B, this_machine())
        said = CliRunner().invoke(cli, ["plan", str(folder_70b)], catch_exceptions=False).output
        assert said.splitlines()[0] == f"{folder_70b} asked with {ways[cap]}"
    assert not ways[""].offload and ways["22"].offload
    assert ways["22"] == choose(MODEL_70B, given_machine(1, 22 + 1.3, 64))


def test_what_fits_nowhere_is_refused_with_what_comes_nearest():
    with pytest.raises(UsageError, match=r"models/mine: too large to ask here: 39\.\d GiB of RAM are needed, 16"):
        choose(MODEL_70B, given_machine(1, 11.6, 16), name="models/mine")
    with pytest.raises(UsageError, match=r"each GPU are needed, 3\.0 are free, with what takes least \(weights in NF4"):
        choose(MODEL_70B, given_machine(1, 3, 512), name="models/mine")


def test_plan_of_a_folder_says_which_way_is_taken(folder_70b):
    flags = ["plan", str(folder_70b), "--gpu", "RTX 4090", "--gpus", "4", "--host-memory", "64"]
    said = CliRunner().invoke(cli, flags, catch_exceptions=False).output
    assert said.splitlines()[0] == f"{folder_70b} asked with weights in NF4, on 3 GPUs"
    rows = json.loads(CliRunner().invoke(cli, [*flags, "--json"], catch_exceptions=False).output)["asking"]
    assert next(row["way"] for row in rows if row["fits"]) == "weights in NF4, on 3 GPUs"
    assert rows[0]["why_not"].endswith("GiB of each GPU are needed, 24.0 are free")


def test_plan_of_a_folder_takes_hardware_only(folder_70b):
    result = CliRunner().invoke(cli, ["plan", str(folder_70b), "--profile", "fsdp_4x24gb"])
    assert result.exit_code == 2 and "is a model's folder, or an adapter's: leave out --profile" in result.output


def test_plan_of_a_folder_looks_at_this_machine_where_none_is_given(folder_70b, monkeypatch):
    monkeypatch.setattr("fitune.planning.hardware.found_here", lambda: given_machine(1, 79, 200))
    said = CliRunner().invoke(cli, ["plan", str(folder_70b)], catch_exceptions=False).output
    assert said.splitlines()[0] == f"{folder_70b} asked with weights in NF4, on 1 GPU"


def test_an_adapter_is_counted_beside_its_base_and_asked_beside_what_it_was_trained_beside(folder_70b, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(folder_70b), "r": 64, "rank_pattern": {"q_proj": 256}}
    linears = sum(rows + columns for rows, columns in SHAPE_70B.linears.values())
    gib = 80 * 256 * linears * 4 / 2**30
    machine = given_machine(1, 79, 256)
    plain = choose(MODEL_70B, machine)
    for targets, size in (("all-linear", gib), (["model.layers.0.mlp.gate_proj"], gib * (8192 + 28672) / linears)):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
        beside = choose(asked_folder(adapter), machine)
        assert size < beside.gpu - plain.gpu < 1.1 * size
        on_cpu = [choose(asked, replace(machine, gpus=())).host for asked in (asked_folder(adapter), MODEL_70B)]
        assert on_cpu[0] - on_cpu[1] == pytest.approx(size)
    offloaded = [[w.host for w in holdings(a, 1) if w.offload] for a in (asked_folder(adapter), MODEL_70B)]
    assert [a - b for a, b in zip(*offloaded, strict=True)] == pytest.approx([size, size])
    (adapter / "fitune_base.json").write_text(json.dumps({"computed_in": "nf4"}))
    assert choose(asked_folder(adapter), given_machine(1, 200, 256), exact=True).load == "nf4"
    flags = ["--gpu", "RTX 4090", "--gpus", "4", "--host-memory", "64"]
    said = CliRunner().invoke(cli, ["plan", str(adapter), *flags], catch_exceptions=False).output
    assert said.startswith(f"{adapter} asked with weights in NF4, on") and "stored" not in said


def test_an_adapters_own_tokens_are_counted_and_the_copy_of_the_head_that_a_loss_takes(folder_70b, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(folder_70b), "r": 16, "target_modules": "all-linear"}
    found = []
    for tokens in (None, {"embed_tokens": [1, 2, 3], "lm_head": [1, 2, 3]}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": tokens}))
        found.append(next(way for way in holdings(asked_folder(adapter), 1) if way.offload))
    without, with_tokens = found
    rows, head = 2 * 3 * 8192 * 4 / 2**30, 128256 * 8192 * 2 / 2**30
    assert with_tokens.host - without.host == pytest.approx(rows)
    assert with_tokens.gpu - without.gpu == pytest.approx(head, rel=0.02)
