"""Every measured run in benchmarks/results/ is a test of `plan`: GPU within 5 %, host RAM 10 %, time 15 or 25 %."""

import json
from statistics import median

import pytest

from benchmarks import accuracy
from fitune.config.model_shapes import find_shape
from fitune.planning.fill import resolve
from fitune.planning.gpu_models import gpu_model
from fitune.planning.memory import gpu_peak, host_peak
from fitune.planning.plan import ERROR, TIME_ERROR, setup_of
from fitune.planning.sizes import GIB
from fitune.planning.step_time import step_seconds

HOST_TOLERANCE = 0.10
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


@pytest.mark.parametrize("entry", MEASURED_RUNS, ids=name)
def test_host_peak_is_predicted(entry):
    predicted = host_peak(accuracy.setup_of_measured(entry)) / GIB
    assert predicted == pytest.approx(entry["peak_host_gib"], rel=HOST_TOLERANCE)


@pytest.mark.parametrize("entry", accuracy.timed_runs(), ids=name)
def test_time_is_predicted(entry):
    """Runs of one row wait for Python: two of the same are up to 20 % apart."""
    measured, tolerance = accuracy.measured_step_seconds(entry), TIME_ERROR if entry["micro_batch"] > 1 else 0.25
    assert accuracy.predicted_step_seconds(entry) == pytest.approx(measured, rel=tolerance)


SMALL_STATES = {
    name: run
    for file in ("full-8b-cards-h200-2026-11-27.json", "full-70b-4xh200-2026-11-27.json")
    for name, run in json.loads((accuracy.ROOT / "benchmarks" / "results" / file).read_text("utf-8"))["runs"].items()
}
"All on H200s."


@pytest.mark.parametrize("run", SMALL_STATES.values(), ids=list(SMALL_STATES))
def test_full_training_with_small_states_is_predicted(run):
    sets = (
        run["set"] | {f"profile.{key}": run[key] for key in ("micro_batch", "kept_layers")} | {"global_batch_size": 16}
    )
    recipe = run.get("recipe", "llama3_8b_full")
    resolved = resolve(recipe, run["profile"], tuple(f"{key}={value}" for key, value in sets.items()))
    setup = setup_of(resolved, find_shape(resolved.recipe.base.model))
    assert gpu_peak(setup).allocated / GIB == pytest.approx(run["peak_allocated_gib"], rel=ERROR)
    total, tolerance = step_seconds(setup, gpu_model("NVIDIA H200"))["total"], TIME_ERROR if setup.ranks == 1 else 0.25
    assert total == pytest.approx(median(run["step_seconds"]), rel=tolerance)


def test_the_published_errors_are_these():
    assert accuracy.PAGE.read_text(encoding="utf-8") == accuracy.page(), "run: python benchmarks/accuracy.py"
