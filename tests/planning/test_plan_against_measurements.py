"""Every measured run in benchmarks/results/ is a test of `plan`: GPU within 5 %, host RAM 10 %, time 15 or 25 %."""

import json
from statistics import median

import pytest

from benchmarks import accuracy, full_results
from benchmarks.optimizer_of_then import with_its_optimizer
from benchmarks.peer_tables import newest_peers
from benchmarks.random_checkpoint import config
from fitune.config.model_shapes import find_shape
from fitune.planning.fill import resolve
from fitune.planning.gpu_models import gpu_model
from fitune.planning.memory import MEASURED, gpu_peak, host_moments, host_peak
from fitune.planning.plan import ERROR, TIME_ERROR, setup_of
from fitune.planning.sizes import GIB
from fitune.planning.step_time import step_seconds

HOST_TOLERANCE = 0.10
LLAMA_3_POSITIONS = 8192
LLAMA_3_1_8B = "meta-llama/Llama-3.1-8B"
"Whose positions the benchmark's long rows need."
MEASURED_RUNS = accuracy.measured_runs()
ALL_RUNS = MEASURED_RUNS + accuracy.runs_of_fewer_layers()


def name(entry: dict) -> str:
    return f"{entry['recipe']}-{entry['profile']}-{entry['layers']}-{entry['date']}"


def test_there_are_measured_runs():
    assert len(MEASURED_RUNS) >= 3


@pytest.mark.parametrize("entry", ALL_RUNS, ids=name)
def test_the_setup_is_the_measured_one(entry):
    setup = accuracy.setup_of_measured(entry)
    assert (setup.ranks, setup.offload, setup.method) == (entry["num_gpus"], entry["offload"], entry["method"])
    assert (setup.shape.layers, setup.max_length) == (entry["layers"], entry["max_length"])
    assert setup.accumulation == entry["gradient_accumulation_steps"]


@pytest.mark.parametrize("entry", ALL_RUNS, ids=name)
def test_gpu_peak_is_predicted(entry):
    peak = gpu_peak(accuracy.setup_of_measured(entry))
    assert abs(accuracy.gpu_error(entry)) <= ERROR
    assert peak.allocated / GIB == pytest.approx(entry["peak_allocated_gib"], rel=ERROR)


def spare_gib(entry: dict) -> float:
    """How far `plan` lies above what the run needed of each GPU."""
    return gpu_peak(accuracy.setup_of_measured(entry)).total / GIB - accuracy.gpu_needs_gib(entry)


@pytest.mark.parametrize("entry", [run for run in ALL_RUNS if run["num_gpus"] > run.get("replicas", 1)], ids=name)
def test_the_holes_of_several_ranks_leave_room_for_what_lies_outside_the_allocator(entry):
    """They take up to 1.6 GiB there, more than MEASURED says; the sum is above what was needed all the same."""
    assert entry["outside_allocator_gib"] <= 1.6 and spare_gib(entry) >= 0.7


@pytest.mark.parametrize("entry", [run for run in ALL_RUNS if run.get("replicas", 1) > 1], ids=name)
def test_ranks_with_a_whole_copy_have_room_for_what_nccl_takes(entry):
    expected = MEASURED.outside_allocator + MEASURED.nccl
    assert entry["outside_allocator_gib"] <= expected / GIB and spare_gib(entry) >= 0.25


@pytest.mark.parametrize("entry", MEASURED_RUNS, ids=name)
def test_host_peak_is_predicted(entry):
    predicted = host_peak(accuracy.setup_of_measured(entry)) / GIB
    assert predicted == pytest.approx(entry["peak_host_gib"], rel=HOST_TOLERANCE)


@pytest.mark.parametrize("entry", accuracy.timed_runs(), ids=name)
def test_time_is_predicted(entry):
    """Runs of one row wait for Python: two of the same are up to 20 % apart."""
    measured, tolerance = accuracy.measured_step_seconds(entry), TIME_ERROR if entry["micro_batch"] > 1 else 0.25
    assert accuracy.predicted_step_seconds(entry) == pytest.approx(measured, rel=tolerance)


BESIDE_PEERS = [
    run for run in newest_peers() if run["who"] == "fitune" and "error" not in run and run.get("gpus", 1) == 1
]


@pytest.mark.parametrize("entry", BESIDE_PEERS, ids=lambda entry: entry["name"])
def test_runs_beside_peers_are_predicted(entry, tmp_path):
    """Each has a GPU of its own. The median step has all its rows; of long ones the time is mostly attention's."""
    model = LLAMA_3_1_8B if entry["length"] > LLAMA_3_POSITIONS else None
    if "layers" in entry:
        (tmp_path / "config.json").write_text(json.dumps(config("8b", entry["layers"])))
        model = tmp_path
    sets = {"max_length": entry["length"], "global_batch_size": entry["rows_a_step"], "profile.host_memory_gib": 256}
    sets |= {f"profile.{key}": entry[key] for key in ("micro_batch", "kept_layers")}
    choices = ("kept_attention", "activation_offload")  # the first runs knew none
    sets |= {f"profile.{key}": entry.get(key, False) for key in choices} | entry["set"]
    sets |= {"base.model": model} if model else {}
    gpu = gpu_model(entry["source"].split(",")[0])
    run = resolve(entry["recipe"], entry["profile"], tuple(f"{key}={value}" for key, value in sets.items()), gpu=gpu)
    setup = with_its_optimizer(setup_of(run, find_shape(run.recipe.base.model)), entry)
    assert gpu_peak(setup).allocated / GIB == pytest.approx(entry["peak_allocated_gib"], rel=ERROR)
    tolerance = 0.1 if model == LLAMA_3_1_8B else TIME_ERROR
    assert step_seconds(setup, gpu)["total"] == pytest.approx(median(entry["step_seconds"]), rel=tolerance)


FULL_RUNS = [entry for entry in full_results.full_runs() if not full_results.had_another_layer(entry)]


UNDISTURBED = [entry for entry in FULL_RUNS if "disturbed" not in entry]
"The others shared machine or GPU with something else: their time and what the card showed are not theirs alone."


def full_name(entry: dict) -> str:
    return f"{entry['name']}-{entry['date']}"


LOSS_OF_THEN_GIB = 0.25
"Until 28 November 2026 a tile of logits lay beside the gradients of the loss."


@pytest.mark.parametrize("entry", FULL_RUNS, ids=full_name)
def test_tensors_of_full_training_on_cards_of_given_sizes_are_predicted(entry):
    predicted, measured = gpu_peak(full_results.setup_of_full_run(entry)).allocated / GIB, entry["peak_allocated_gib"]
    then = LOSS_OF_THEN_GIB if entry["date"] <= "2026-11-28" else 0.0
    assert (1 - ERROR) * measured - then <= predicted <= (1 + ERROR) * measured


ON_CARDS_OF_THEIR_OWN = [entry for entry in FULL_RUNS if full_results.card_gib(entry)]


@pytest.mark.parametrize("entry", ON_CARDS_OF_THEIR_OWN, ids=full_name)
def test_the_card_of_full_training_is_predicted(entry):
    """Between what was needed and what was kept, or as near to one of them as `plan` says it may be."""
    needed, kept = full_results.card_gib(entry)
    predicted = gpu_peak(full_results.setup_of_full_run(entry)).total / GIB
    assert (1 - ERROR) * needed <= predicted <= (1 + ERROR) * kept


STATES_IN_RAM = [entry for entry in FULL_RUNS if entry.get("peak_host_rss_sum_gib", 0) > 10]
"Elsewhere RAM is that of processes and little else."


@pytest.mark.parametrize("entry", STATES_IN_RAM, ids=full_name)
def test_host_ram_of_full_training_is_predicted(entry):
    """Of the ranks' processes: what was measured counts neither the launcher nor a save."""
    setup = full_results.setup_of_full_run(entry)
    moments = {phase: sum(parts.values()) for phase, parts in host_moments(setup).items() if phase != "save"}
    predicted = (max(moments.values()) - MEASURED.launcher) / GIB
    assert predicted == pytest.approx(entry["peak_host_rss_sum_gib"], rel=HOST_TOLERANCE)


@pytest.mark.parametrize("entry", UNDISTURBED, ids=full_name)
def test_time_of_full_training_on_cards_of_given_sizes_is_predicted(entry):
    setup = full_results.setup_of_full_run(entry)
    seconds = step_seconds(setup, gpu_model(entry["gpu_name"]))["total"]
    as_calibrated = setup.micro_batch > 1 and setup.shape.layers >= 32  # no constant comes from smaller models
    tolerance = TIME_ERROR if as_calibrated else 0.25
    assert seconds == pytest.approx(median(entry["step_seconds"]), rel=tolerance)


def test_seventy_billion_in_full_on_four_gpus_take_as_long_as_planned():
    """Measured: 13.7 s. Without what collectives and the copies around them cost, `plan` said 11.3."""
    entry = next(entry for entry in full_results.full_runs() if entry["name"] == "four_h200")
    setup, gpu = full_results.setup_of_full_run(entry), gpu_model(entry["gpu_name"])
    assert step_seconds(setup, gpu)["total"] == pytest.approx(median(entry["step_seconds"]), rel=0.05)


def test_the_published_errors_are_these():
    assert accuracy.PAGE.read_text(encoding="utf-8") == accuracy.page(), "run: python benchmarks/accuracy.py"
