"""planning/memory.py against the model's own code on fake tensors (benchmarks/fake_memory.py shares no formula)."""

import json
import os
from pathlib import Path

import pytest
import quick_python
from patience import PATIENCE_SECONDS

from benchmarks.accuracy import FAKE, predicted_phases

ROOT = Path(__file__).resolve().parents[2]
TIERS = {("llama3_70b_lora", "fsdp_lora_8x80gb"), ("llama3_70b_full", "fsdp_full_16x80gb")}
"Too large to be measured on one GPU."
TOLERANCE = 0.10
PHASES = ("forward, gathering the head", "forward, loss", "backward, loss", "backward, last layer",
          "backward, second layer", "backward, embedding", "optimizer step")  # fmt: skip
RESULTS = json.loads(FAKE.read_text(encoding="utf-8"))


def test_the_tiers_that_cannot_be_measured_are_there_at_full_depth():
    assert {(entry["recipe"], entry["profile"]) for entry in RESULTS if entry["layers"] == 80} >= TIERS


@pytest.mark.parametrize("entry", RESULTS, ids=lambda entry: f"{entry['recipe']}-{entry['profile']}-{entry['compute']}")
def test_phases_agree(entry):
    assert agree(entry)
    largest = max(predicted_phases(entry)[phase] for phase in PHASES)
    assert entry["peak_allocated_gib"] == pytest.approx(largest, rel=0.02)


@pytest.mark.parametrize(
    "asked",
    [
        ["llama3_70b_qlora", "fsdp_4x24gb"],
        ["llama3_70b_qlora", "fsdp_4x24gb", "--compute", "fp8"],
        ["llama3_70b_lora", "fsdp_lora_8x80gb", "--compute", "fp8"],
    ],
    ids=["qlora", "qlora in fp8", "lora in fp8"],
)
def test_phases_agree_in_a_run_of_three_layers(asked, tmp_path):
    """The model's code as it is now: a change to it that takes more memory is noticed."""
    [entry] = measured(tmp_path, [*asked, "--layers", "3"])
    assert agree(entry)


def test_what_fp8_takes_in_full_fine_tuning_is_there(tmp_path):
    """The gradients of gate and up, rounded, and their weights, turned: at the peak of a layer's backward pass."""
    few = ("profile.micro_batch=4", "profile.kept_layers=0")  # one tile of tokens
    asked = ["llama3_8b_full", "fsdp_2x80gb", "--layers", "3", *(part for value in few for part in ("--set", value))]
    bf16, fp8 = measured(tmp_path, [*asked, "--compute", "bf16"], [*asked, "--compute", "fp8"])
    for phase in ("backward, last layer", "backward, second layer"):
        found = fp8["phases"][phase] - bf16["phases"][phase]
        assert found > 0.1
        assert found == pytest.approx(predicted_phases(fp8)[phase] - predicted_phases(bf16)[phase], abs=0.01), phase


@pytest.mark.parametrize("compute", ["bf16", "fp8"])
def test_a_trained_layer_that_works_in_tiles_is_there(compute, tmp_path):
    """Of 24,576 tokens, all of which gate and up are kept."""
    [entry] = measured(tmp_path, ["llama3_8b_full", "fsdp_2x80gb", "--layers", "3", "--compute", compute])
    assert (entry["tokens"], entry["kept_layers"]) == (24576, 3)
    assert agree(entry, 0.03)


@pytest.mark.parametrize("rows", [3, 8])
def test_a_kept_layer_beside_a_frozen_base_that_works_in_tiles_is_there(rows, tmp_path):
    """Of rows of 8,192 tokens: its gate and up stay to the end of its backward pass."""
    sets = (f"profile.micro_batch={rows}", "profile.kept_layers=3", "profile.activation_offload=false")
    sets += ("max_length=8192", f"global_batch_size={2 * rows}")
    asked = ["llama3_8b_qlora", "fsdp_2x40gb", "--layers", "3", *(part for value in sets for part in ("--set", value))]
    [entry] = measured(tmp_path, asked)
    assert (entry["tokens"], entry["kept_layers"]) == (rows * 8192, 3)
    for phase in ("backward, last layer", "backward, second layer"):
        predicted = predicted_phases(entry)[phase]
        assert 0.94 * predicted < entry["phases"][phase] < predicted, phase  # as of a layer that is not kept


def test_one_rank_of_full_fine_tuning_in_float32_is_there(tmp_path):
    """Whose gradients stay where they were computed."""
    float32 = ("profile.optimizer_state=fp32", "profile.optimizer_offload=false", "profile.micro_batch=1")
    asked = ["llama3_8b_full", "full_1x48gb", "--layers", "3", *(p for value in float32 for p in ("--set", value))]
    [entry] = measured(tmp_path, asked)
    assert agree(entry, 0.02)


@pytest.mark.parametrize("copies", [2, 16])
def test_what_copies_still_add_up_is_there(copies, tmp_path):
    """Sums in float32 of gradients that are kept in bf16: of the last unit, beside what computes."""
    sets = ("optimizer_state=bf16_8bit", "micro_batch=1", "kept_layers=0", f"replicas={copies}")
    asked = ["llama3_70b_full", "fsdp_full_16x80gb", "--layers", "3"]
    [entry] = measured(tmp_path, [*asked, *(part for value in sets for part in ("--set", f"profile.{value}"))])
    predicted = predicted_phases(entry)
    for phase in ("backward, last layer", "backward, second layer", "backward, embedding"):
        assert entry["phases"][phase] == pytest.approx(predicted[phase], rel=0.01), phase


def test_what_kept_gathered_weights_add_is_there(tmp_path):
    """All layers' until the backward pass is through with them, less the next layer's, which is not gathered again."""
    asked = ["llama3_8b_full", "fsdp_2x80gb", "--layers", "4"]
    freed, kept = measured(tmp_path, asked, [*asked, "--keep-gathered"])
    assert (freed["reshard_after_forward"], kept["reshard_after_forward"]) == (True, False)
    before, after = predicted_phases(freed), predicted_phases(kept)
    added = {phase: kept["phases"][phase] - freed["phases"][phase] for phase in PHASES}
    assert added == pytest.approx({phase: after[phase] - before[phase] for phase in PHASES}, abs=0.002)
    layer = added["forward, loss"] / 4
    assert layer > 0.4 and added["backward, loss"] == pytest.approx(3 * layer, abs=0.002)
    assert added["backward, last layer"] == pytest.approx(2 * layer, abs=0.002)


def measured(folder: Path, *runs: list[str]) -> list[dict]:
    """What the command writes of each of the runs, started after each other."""
    output = folder / "fake.json"
    for asked in runs:
        command = ["benchmarks/fake_memory.py", output, *asked]
        done = quick_python.run(command, dict(os.environ), ROOT, PATIENCE_SECONDS)
        assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text(encoding="utf-8"))


def agree(entry: dict, tolerance: float = TOLERANCE) -> bool:
    predicted = predicted_phases(entry)
    return {phase: entry["phases"][phase] for phase in PHASES} == pytest.approx(
        {phase: predicted[phase] for phase in PHASES}, rel=tolerance
    )
