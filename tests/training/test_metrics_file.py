"""metrics.jsonl over an interruption."""

import json
from types import SimpleNamespace

import pytest

from fitune.training.measure import Measurements
from fitune.training.metrics_file import MetricsFile


def test_the_time_trained_goes_on_from_the_checkpoint_that_is_resumed(tmp_path):
    lines = [{"step": 5, "loss": 2.0, "seconds": 1000.0}, {"step": 9, "loss": 1.5, "seconds": 3000.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file, state = MetricsFile(tmp_path), SimpleNamespace(is_world_process_zero=True, global_step=5)
    file.on_train_begin(None, state, None)
    state.global_step = 6
    file.on_log(None, state, None, logs={"loss": 1.9})
    kept, new = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert kept == lines[0]
    assert (new["step"], new["loss"]) == (6, 1.9)
    assert 1000 <= new["seconds"] < 2000, "neither from the start again, nor from what was forgotten"


def test_a_log_line_has_the_speed_of_the_steps_since_the_one_before(tmp_path, monkeypatch):
    measurements = Measurements(tmp_path, {}, planned_gib=7.0)
    assert measurements.since_last_log() == {}, "the first step compiles"
    measurements.steps += [(2.0, 100.0), (3.0, 400.0)]
    assert measurements.since_last_log() == {"tokens_per_second": 100.0}
    measurements.steps.append((1.0, 50.0))
    monkeypatch.setattr("fitune.training.measure.process_peaks", lambda: {"peak_allocated_gib": 6.5})
    expected = {"tokens_per_second": 50.0, "gpu_memory_gib": 6.5, "gpu_memory_planned_gib": 7.0}
    assert measurements.since_last_log() == pytest.approx(expected)
