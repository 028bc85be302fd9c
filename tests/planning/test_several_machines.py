"""Several machines in `plan`: what hybrid sharding takes and saves, when it is chosen, what is said of the network."""

import json
import re
from dataclasses import replace

import pytest
from click.testing import CliRunner

from fitune.cli import cli
from fitune.config.accelerate_config import read_accelerate_config
from fitune.config.model_shapes import find_shape
from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.planning.fill import resolve
from fitune.planning.gpu_models import gpu_model
from fitune.planning.limits import given_machine, limits_of
from fitune.planning.machine import Machine
from fitune.planning.memory import checkpoint_copy, gpu_peak, host_peak
from fitune.planning.network import ways_to_spread
from fitune.planning.plan import make_plan, setup_of, setup_to_train
from fitune.planning.search import find
from fitune.planning.sizes import GIB
from fitune.planning.step_time import step_seconds
from fitune.planning.words import ON_GPUS, places

H100 = gpu_model("H100")


def _setup(recipe: str, *sets: str, gpus: int = 8, machines: int = 2, gib: float = 80, host: float = 1024):
    """Of a run on all GPUs with one row a pass, no layer kept and no gathered weights."""
    sets = ("profile.micro_batch=1", "profile.kept_layers=0", *sets)
    run = _all_on_the_gpus(recipe, sets, given_machine(gpus, gib, host), machines)
    return replace(setup_of(run, find_shape(run.recipe.base.model)), reshard=True)


def _all_on_the_gpus(recipe: str, sets: tuple[str, ...], machine: Machine, machines: int) -> Run:
    """Of what a search tries, the run on all GPUs with nothing in RAM."""
    found = find(recipe, sets, machine, H100, machines=machines)
    everywhere = len(machine.gpus) * machines
    plans = [plan for plan in (found.plan, *found.tried) if plan.setup.ranks == everywhere]
    return next(
        plan.run for plan in plans if places(plan)[0] == ON_GPUS and len(places(plan)) == 1 + plan.setup.small_states
    )


@pytest.mark.parametrize("recipe", ["llama3_70b_qlora", "llama3_70b_lora", "llama3_8b_full"])
def test_with_hybrid_sharding_a_machine_takes_what_it_takes_alone(recipe):
    batch = ("global_batch_size=32", "profile.replicas=2")
    hybrid, alone = _setup(recipe, *batch), _setup(recipe, "global_batch_size=16", "profile.replicas=1", machines=1)
    assert (hybrid.ranks, hybrid.replicas, hybrid.shards, alone.shards) == (16, 2, 8, 8)
    assert hybrid.accumulation == alone.accumulation == 2
    assert gpu_peak(hybrid).total == pytest.approx(gpu_peak(alone).total)
    assert host_peak(hybrid) == pytest.approx(host_peak(alone))
    saving = [replace(setup, saves=True, async_save=True) for setup in (hybrid, alone)]
    assert checkpoint_copy(saving[0]) == pytest.approx(checkpoint_copy(saving[1]))
    over_all = _setup(recipe, "global_batch_size=32", "profile.replicas=1")
    assert gpu_peak(over_all).total < gpu_peak(hybrid).total


def test_replicas_of_one_gpu_add_up_gradients_and_no_more():
    """Nothing is gathered where each machine has one GPU."""
    hybrid = _setup("llama3_8b_lora", "profile.replicas=2", gpus=1)
    assert hybrid.shards == 1 and hybrid.unsharded_layer == 0
    parts = step_seconds(hybrid, H100, network_gb_s=10)
    assert parts["adding up adapters"] == pytest.approx(
        hybrid.trainable * 4 / (10e9 * 0.85)
    )  # 2 x (2 - 1) / 2 of float32


def test_gradients_that_wait_for_the_last_pass_are_float32():
    """Those of small optimizer states are bf16 once they have been added up."""
    sets = ("global_batch_size=32", "profile.optimizer_state=bf16_8bit", "profile.replicas=2")
    setup = _setup("llama3_8b_full", *sets)
    assert setup.accumulated_on_gpu and setup.waiting_gradients == 2 * setup.gradients
    in_ram = replace(setup, optimizer_offload=True)
    assert not in_ram.reduced_once and not in_ram.accumulated_on_gpu


def test_adapters_gradients_wait_whole_where_a_gpu_has_room():
    """They are reduced once a step then: the rest of the traffic is weights gathered for each micro batch."""
    sets = ("global_batch_size=32", "profile.activation_offload=false")
    run = _all_on_the_gpus("llama3_70b_qlora", sets, given_machine(8, 24, 1024), 1)
    shape = find_shape(run.recipe.base.model)
    reduced_often, waiting = setup_of(run, shape), setup_to_train(run, shape)
    assert waiting == replace(reduced_often, adapters_wait=True) and waiting.accumulation > 1
    assert waiting.waiting_gradients == 8 * reduced_often.waiting_gradients == waiting.trainable * 4
    assert reduced_often.trainable * 4 > gpu_peak(waiting).total - gpu_peak(reduced_often).total > 0
    saved = [step_seconds(setup, H100)["network"] for setup in (reduced_often, waiting)]
    passes_saved = (waiting.accumulation - 1) * waiting.trainable * 4 * 7 / 8
    assert saved[0] - saved[1] == pytest.approx(passes_saved / (H100.peer_link_gb_s * 0.85e9))
    full_card = run.profile.model_copy(update={"gpu_memory_gib": gpu_peak(reduced_often).total / GIB})
    assert setup_to_train(run.model_copy(update={"profile": full_card}), shape) == reduced_often


def test_the_network_between_machines_is_crossed_once_a_step_by_gradients_on_the_gpu():
    once, often = (_setup("llama3_8b_full", f"global_batch_size={rows}", "profile.replicas=2") for rows in (16, 64))
    inside = [step_seconds(setup, H100, network_gb_s=1e9)["network"] for setup in (once, often)]
    between = [step_seconds(setup, H100)["network"] - part for setup, part in zip((once, often), inside, strict=True)]
    assert inside[1] == pytest.approx(4 * inside[0]) and between[1] == pytest.approx(between[0])
    offloaded = step_seconds(replace(often, offload=True), H100)["network"]
    assert offloaded == pytest.approx(inside[1] + 4 * between[0])


@pytest.mark.parametrize("recipe", ["llama3_8b_qlora", "llama3_70b_qlora", "llama3_8b_lora", "llama3_70b_lora"])
def test_auto_is_hybrid_for_adapters_wherever_it_fits(recipe):
    replicas = find(recipe, (), given_machine(8, 80, 512), H100, machines=2).plan.setup.replicas
    assert replicas > 1 and replicas % 2 == 0
    sets = ("profile.embedding_offload=false", "profile.micro_batch=1")
    tight = _all_on_the_gpus("llama3_70b_lora", sets, given_machine(2, 80, 512), machines=2)
    assert tight.profile.replicas == 1  # 131 GiB of weights on two cards


def test_auto_is_hybrid_for_full_where_it_fits_and_is_faster():
    def choice(*sets: str) -> int:
        return resolve("llama3_70b_full", "fsdp_full_16x80gb", sets).profile.replicas

    assert choice() == 1  # 16 bytes a parameter over 8 cards
    assert choice("profile.optimizer_state=bf16_8bit") == 2
    assert resolve("llama3_70b_full", "fsdp_full_8x80gb").profile.replicas == 1


def test_plan_says_what_the_network_costs_and_what_lowers_it():
    done = CliRunner().invoke(cli, ["plan", "llama3_70b_full", "--profile", "fsdp_full_16x80gb"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("network     between 2 machines"))
    assert "(one copy over all GPUs, weights travel): 37 s of a step beside 3.5 s of computing" in lines[start]
    assert "with --set profile.replicas=2: does not fit: GPU memory: needs 144" in lines[start + 1]
    small = "with --set profile.optimizer_state=bf16_8bit --set profile.replicas=2: 28 s of a step"
    assert small in lines[start + 2]


def test_machines_that_are_not_needed_are_named():
    """Eight rows are one for each of eight GPUs: the second machine adds a network and nothing else."""
    machine = given_machine(8, 80, 512)
    idle = find("llama3_70b_qlora", (), machine, H100, machines=2).why_idle()
    assert idle == (
        "8 of 16 GPUs stay idle: one machine has as many as are used, and no network between them: leave out --machines"
    )
    more_rows = find("llama3_70b_qlora", ("global_batch_size=16",), machine, H100, machines=2)
    assert more_rows.idle == 0 and more_rows.why_idle() is None


@pytest.mark.parametrize(("rows", "said"), [(3, "1 of 4 copies of the model have no row: a step has 3"), (4, None)])
def test_machines_that_a_step_has_no_row_for_are_counted(rows, said):
    found = find("llama3_8b_qlora", (f"global_batch_size={rows}",), given_machine(1, 80, 64), H100, machines=4)
    assert (found.why_idle() or "").startswith(said or "") and bool(found.why_idle()) == bool(said)


def test_plan_for_as_many_machines_as_are_given():
    flags = ["--gpus", "8", "--gpu", "H100", "--machines", "2", "--host-memory", "512", "--find", "--json"]
    done = CliRunner().invoke(cli, ["plan", "llama3_70b_qlora", *flags])
    found = json.loads(done.stdout)
    assert found["machines"] == 2 and found["gpus_there"] == 16
    planned, otherwise = found["network"]
    assert planned["replicas"] == 2 and otherwise["set"] == {"profile.replicas": "1"}
    assert planned["network_seconds"] < 0.1 * otherwise["network_seconds"]
    alone = CliRunner().invoke(cli, ["plan", "llama3_70b_qlora", "--gpus", "8", "--gpu", "H100", "--json"])
    assert json.loads(alone.stdout)["network"] == []


def test_what_whole_copies_exchange_is_what_the_network_costs():
    asked = ["plan", "llama3_8b_qlora", "--gpus", "4", "--gpu", "RTX 4090", "--machines", "2", "--network", "1"]
    asked += ["--host-memory", "256", "--set", "global_batch_size=64", "--json"]
    planned, otherwise = json.loads(CliRunner().invoke(cli, asked).stdout)["network"]
    assert planned["replicas"] == 8 and 0.1 < planned["network_seconds"] < otherwise["network_seconds"]
    parted = planned["step_seconds"] - planned["network_seconds"] - planned["compute_seconds"]
    assert parted == pytest.approx(0, abs=0.01), "after computing, not beside it"


def test_the_network_that_is_given_is_what_the_choice_is_made_by():
    """Sixteen GPUs wait for 100 Gbit/s between their machines, and not for 400 GB/s."""
    asked = ["plan", "llama3_8b_full", "--gpus", "8", "--gpu", "H100", "--machines", "2", "--host-memory", "512"]

    def chosen(*more: str) -> dict:
        done = CliRunner().invoke(cli, [*asked, "--json", *more])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    slow, fast = chosen(), chosen("--network", "400")
    assert (slow["gpus"], fast["gpus"], fast["gpus_idle"]) == (4, 16, 0)
    everywhere = chosen("--network", "400", "--set", "profile.num_gpus=16")
    assert everywhere["estimate"] == fast["estimate"]


def test_copies_are_spread_for_the_network_that_is_given():
    asked = ("llama3_70b_full", "fsdp_full_16x80gb", ("profile.optimizer_state=bf16_8bit",))
    assert [resolve(*asked, network=gb_s).profile.replicas for gb_s in (None, 800)] == [2, 1]


@pytest.mark.parametrize("said", [True, False])
def test_the_comparison_keeps_what_the_accelerate_config_says(said, tmp_path):
    """Whether a layer's gathered weights are freed."""
    file = tmp_path / "sixteen.yaml"
    line = f"  fsdp_reshard_after_forward: {str(said).lower()}\n"
    text = "distributed_type: FSDP\nmixed_precision: bf16\nnum_processes: 16\nnum_machines: 2\nfsdp_config:\n"
    file.write_text(f"{text}  fsdp_version: 2\n{line}")
    sets = (f"profile.accelerate_config={file}", "profile.replicas=1", "global_batch_size=32")
    sets += ("profile.fits={70b: [qlora]}",)

    def planned(changed=()):
        run = resolve("llama3_70b_qlora", "fsdp_full_16x80gb", (*sets, *changed), gpu=H100)
        return make_plan(run, limits_of(run), H100)

    chosen = [way.plan.setup.reshard for way in ways_to_spread(planned(), planned)]
    assert chosen == [said, said]


def test_what_is_said_of_another_number_of_copies_is_what_typing_it_finds():
    """Also where weights then lie elsewhere: on two machines of two cards each copy of 70B has its own in RAM."""
    words = ["plan", "llama3_70b_qlora", "--gpu", "RTX 4090", "--gpus", "2", "--machines", "2", "--host-memory", "512"]
    words += ["--json"]
    _, other = json.loads(CliRunner().invoke(cli, words).stdout)["network"]
    [(key, value)] = other["set"].items()
    typed = json.loads(CliRunner().invoke(cli, [*words, "--set", f"{key}={value}"]).stdout)["network"][0]
    assert other["fits"] and {**typed, "set": None} == {**other, "set": None}


def test_what_is_refused_when_it_is_typed_is_not_said_to_fit():
    """Small states of weights in RAM are never tried: what comes closest to fitting has the weights on the GPUs."""
    words = ["plan", "llama3_8b_full", "--gpu", "RTX 3060", "--gpus", "8", "--gpu-memory", "8", "--host-memory", "64"]
    words += ["--machines", "3", "--set", "max_length=1024"]
    *_, small = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)["network"]
    assert small["set"] == {"profile.optimizer_state": "bf16_8bit", "profile.replicas": "3"} and not small["fits"]
    typed = [part for key, value in small["set"].items() for part in ("--set", f"{key}={value}")]
    refused = CliRunner().invoke(cli, [*words, *typed])
    lacks = re.search(r": (GPU memory: needs .* too little);", refused.stderr)[1]
    assert f"with {' '.join(typed)}: does not fit: {lacks}\n" in CliRunner().invoke(cli, words).stdout


def test_machines_that_would_have_unequal_ranks_are_refused(tmp_path):
    file = tmp_path / "three.yaml"
    file.write_text("distributed_type: FSDP\nuse_cpu: true\nnum_processes: 3\nnum_machines: 2\n")
    with pytest.raises(UsageError, match="num_processes 3 can't be spread evenly over num_machines 2; make it a mult"):
        read_accelerate_config(file)
