"""benchmarks/full_runs.json resolves and fits its cards; benchmarks/full_runs.py stops what it has measured."""

import argparse
import json
import time
from dataclasses import replace

import psutil
import pytest

from benchmarks import full_runs, random_checkpoint
from fitune.config.model_shapes import find_shape
from fitune.planning.fill import resolve
from fitune.planning.memory import MEASURED, gpu_peak
from fitune.planning.plan import setup_of
from fitune.planning.sizes import GIB

ENTRIES = json.loads(full_runs.ENTRIES.read_text(encoding="utf-8"))
KEYS = {"name", "recipe", "profile", "model", "checkpoint", "gpus", "cap_gib", "steps", "set", "seconds"}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_a_run_resolves_and_fits(entry):
    assert set(entry) in (KEYS, KEYS - {"cap_gib"})
    sets = {"base.model": entry["model"], **entry["set"]}
    run = resolve(entry["recipe"], entry["profile"], tuple(f"{key}={value}" for key, value in sets.items()))
    assert run.accelerate.num_processes == entry["gpus"] and not run.left_to_plan
    shape, layers = find_shape(entry["model"]), entry["checkpoint"].split("-")[2:]
    setup = setup_of(run, replace(shape, layers=int(layers[0])) if layers else shape)
    card = entry["cap_gib"] * GIB + MEASURED.outside_allocator if "cap_gib" in entry else 139 * GIB
    assert gpu_peak(setup).total <= card


@pytest.mark.parametrize("size", ["1b", "3b", "8b", "70b"])
def test_random_checkpoints_have_the_shape_of_their_models(size):
    names = {"1b": "Llama-3.2-1B", "3b": "Llama-3.2-3B", "8b": "Meta-Llama-3-8B", "70b": "Meta-Llama-3-70B"}
    config = random_checkpoint.config(size, None)
    shape, tensors = find_shape(f"meta-llama/{names[size]}"), dict(random_checkpoint.tensors(config))
    assert sum(rows * columns for rows, columns in ((*s, 1)[:2] for s in tensors.values())) == shape.parameters
    assert shape.tied == config["tie_word_embeddings"] == ("lm_head.weight" not in tensors)


MEASURES = """
import json, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output") + 1])
folder.mkdir(parents=True)
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(folder.parent / "pid").write_text(str(rank.pid))
(folder / "run.yaml").write_text(
    "profile: {micro_batch: 2, kept_layers: 3, replicas: 1}\\ngradient_accumulation_steps: 4\\n"
    "sets: " + json.dumps(sys.argv[1:])
)
(folder / "metrics.jsonl").write_text('{"loss": 2.5, "grad_norm": 1.0}\\n{"eval_loss": 3.0}\\n')
(folder / "measurements.json").write_text(json.dumps({
    "tokens_per_second": 200.4, "tokens_per_second_per_gpu": 100.2, "step_seconds": [1.5], "step_tokens": [300],
    "optimizer": "AdamWOnRows", "gradients": "bfloat16", "optimizer_seconds": [0.1], "load_seconds": 2,
    "peak_allocated_gib": 1.234, "peak_reserved_gib": 2.345,
    "ranks": [{"peak_host_rss_gib": 1.5}, {"peak_host_rss_gib": 2.5}],
}))
time.sleep(600)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(script)`: what is measured of a `cli.py` that is this script."""
    monkeypatch.setattr(full_runs, "ROOT", tmp_path)
    monkeypatch.setattr(full_runs, "SETTLES_SECONDS", 0.2)
    options = argparse.Namespace(models=tmp_path / "models", data=tmp_path / "data", work=tmp_path)

    def run(script: str, seconds: float) -> dict:
        (tmp_path / "cli.py").write_text(script)
        return full_runs.measured(ENTRIES[0], "0", seconds, options)

    return run


def test_a_run_is_stopped_with_all_its_processes_when_it_is_measured(run, tmp_path):
    result = run(MEASURES, 60)
    assert (result["micro_batch"], result["kept_layers"], result["accumulation"]) == (2, 3, 4)
    assert (result["median_tokens_per_second_per_gpu"], result["peak_allocated_gib"]) == (100, 1.23)
    assert (result["peak_host_rss_sum_gib"], result["losses"]) == (4.0, [2.5])
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_run_that_fails_or_takes_too_long_says_so(run):
    assert "exit code 3: no room" in run("import sys; print('no room'); sys.exit(3)", 60)["error"]
    began = time.monotonic()
    assert run("import time; time.sleep(600)", 0.5)["error"].startswith("no time left")
    assert time.monotonic() - began < 60


def test_what_is_measured_or_would_not_end_in_time_is_not_begun(tmp_path, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(full_runs, "find_shape", lambda folder: find_shape(ENTRIES[0]["model"]))
    monkeypatch.setattr(full_runs, "planned", lambda *args: {})
    monkeypatch.setattr(full_runs, "measured", lambda entry, *args: begun.append(entry["name"]) or {"error": "none"})
    options = argparse.Namespace(models=tmp_path, data=tmp_path, end=time.monotonic() + 1000)
    report = full_runs.Report(tmp_path / "result.json", "abc")
    report.add("a", {"losses": [1.0]})
    for name, seconds in (("a", 1), ("b", 1), ("c", 9999), ("b", 1)):
        full_runs.run_one(ENTRIES[0] | {"name": name, "seconds": seconds}, "0", report, options)
    assert begun == ["b", "b"] and "c: not begun" in capsys.readouterr().out, "an error is tried again"
    assert set(json.loads((tmp_path / "result.json").read_text())["runs"]) == {"a", "b"}
    assert set(full_runs.Report(tmp_path / "result.json", "def").runs) == {"a", "b"}


@pytest.mark.parametrize(("used", "disturbed"), [(0.4, False), (2.7, True)])
def test_a_gpu_that_something_else_uses_is_said(used, disturbed, run, monkeypatch):
    """What nvidia-smi showed of such a card was once held against `plan`."""
    monkeypatch.setattr(full_runs, "used_gib", lambda gpus: used)
    assert run(MEASURES, 60).get("disturbed") == ("2.7 GiB of the GPU were in use before" if disturbed else None)


PLANS = """
import json, os, sys
assert sys.argv[1] == "plan" and sys.argv[-1] == "--json"
print(json.dumps({
    "micro_batch": sys.argv.count("--set"), "kept_layers": 2, "replicas": 1, "peak_allocated_gib": 9.5,
    "peak_gpu_gib": float(os.environ["FITUNE_GPU_CAP_GIB"]), "peak_host_gib": 3, "estimate": None,
}))
"""


def test_plan_is_asked_what_train_will_be_told_for_the_gpu_that_is_here(tmp_path, monkeypatch):
    """A run held to a part of a card keeps fewer layers than the card could: `planned` once was the whole card's."""
    monkeypatch.setattr(full_runs, "ROOT", tmp_path)
    (tmp_path / "cli.py").write_text(PLANS)
    options = argparse.Namespace(models=tmp_path / "models", data=tmp_path / "data")
    said = full_runs.planned(ENTRIES[0], "0", options)
    assert said["micro_batch"] == len(full_runs.sets_of(ENTRIES[0], options)) and said["step_seconds"] is None
    assert (said["all_gib"], said["allocated_gib"], said["kept_layers"]) == (ENTRIES[0]["cap_gib"], 9.5, 2)


def test_what_plan_really_says_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(full_runs, "sets_of", lambda *_: {"base.model": ENTRIES[0]["model"], **ENTRIES[0]["set"]})
    said = full_runs.planned(ENTRIES[0], "0", argparse.Namespace())
    assert 8 < said["allocated_gib"] < said["all_gib"] <= 11.7 and said["step_seconds"] > 0


def test_an_unknown_name_is_said():
    with pytest.raises(SystemExit, match="--only 9b: not in full_runs"):
        full_runs.entries(["9b", "1b, 12 GB"])
    assert [entry["name"] for entry in full_runs.entries(["1b, 12 GB"])] == ["1b, 12 GB"]


def test_folders_are_different():
    assert len({full_runs.folder_name(entry) for entry in ENTRIES}) == len(ENTRIES)
