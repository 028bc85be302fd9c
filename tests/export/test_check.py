"""The check of what was written: right merges pass with room to spare, each kind of wrong one is refused."""

import json

import pytest
import torch
from adapters import IDS, logits, set_values
from safetensors.torch import load_file, save_file

from fitune.errors import FituneError
from fitune.export import check, merge
from fitune.export.adapter import AdapterFile, read_adapter
from fitune.export.check import check_written
from fitune.export.merge import merge_adapter
from fitune.export.tuned_weights import TunedWeights
from fitune.weights.base_weights import BaseWeights
from fitune.weights.safetensors_files import Checkpoint, CheckpointWriter

PROMPTS = [IDS[0].tolist(), [5, 77, 300]]


def compare(base, adapter, written, prompts=PROMPTS) -> check.Comparison:
    with Checkpoint(base) as checkpoint, AdapterFile(adapter) as file:
        tuned = TunedWeights(BaseWeights(checkpoint), read_adapter(file), file, tied=False)
        return check_written(written, tuned, torch.bfloat16, prompts)


def test_a_right_merge_is_far_below_the_bound(base, adapter, tmp_path):
    """It is one random rounding, and the bound four times the difference that another makes."""
    out = merge_adapter(base, adapter, tmp_path / "out", progress=False, check=False)
    found = compare(base, adapter, out)
    assert found.largest_difference < found.bound / 2
    assert (found.prompts, found.tokens) == (2, 13)


def test_it_measures_what_plain_transformers_and_peft_measure(base, adapter, tmp_path):
    """Of prompts of several lengths too, where padding does not count."""
    out = merge_adapter(base, adapter, tmp_path / "out", progress=False, check=False)
    expected = (logits(out) - logits(base, adapter)).abs().max().item()
    assert compare(base, adapter, out, PROMPTS[:1]).largest_difference == pytest.approx(expected, rel=0.02)
    both = compare(base, adapter, out, [PROMPTS[0], PROMPTS[0][:3]])
    assert both.tokens == 13
    assert both.largest_difference == pytest.approx(expected, rel=0.02)  # the shorter is a part of the longer


@pytest.mark.parametrize(
    "damage",
    ["the base", "another scale", "one layer's module left out", "rows in another order", "token rows left out"],
)
def test_a_wrong_merge_is_refused(base, adapter, tmp_path, damage):
    out = merge_adapter(base, adapter, tmp_path / "out", progress=False, check=False)
    file = out / "model.safetensors"
    tensors = load_file(file)
    with Checkpoint(base) as checkpoint:
        before = {name: checkpoint.read(name) for name in checkpoint.tensors}
    name = "model.layers.1.mlp.down_proj.weight"
    if damage == "the base":
        tensors = before
    elif damage == "another scale":
        tensors = {n: before[n] + (t - before[n]) * 1.1 for n, t in tensors.items()}
    elif damage == "one layer's module left out":
        tensors[name] = before[name]
    elif damage == "rows in another order":
        tensors[name] = tensors[name].flip(0).contiguous()
    else:
        tensors["model.embed_tokens.weight"] = before["model.embed_tokens.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FituneError, match=r"differ .* by at most .*\(bound .*not the model that was trained"):
        compare(base, adapter, out)


def test_what_is_not_a_number_is_refused(base, adapter, tmp_path):
    out = merge_adapter(base, adapter, tmp_path / "out", progress=False, check=False)
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FituneError, match="not the model that was trained"):
        compare(base, adapter, out)


def test_a_merge_that_fails_its_check_leaves_nothing(base, adapter, tmp_path, monkeypatch):
    write = CheckpointWriter.write
    monkeypatch.setattr(CheckpointWriter, "write", lambda self, name, tensor: write(self, name, tensor.flip(0)))
    with pytest.raises(FituneError, match="nothing is left of it"):
        merge_adapter(base, adapter, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_config_of_another_architecture_is_refused(base, adapter, tmp_path, monkeypatch):
    """Weights alone do not make the model: what config.json says of them is compared with the base's."""
    write = merge.write_small_files

    def with_another_theta(base, adapter, output, config, dtype):
        write(base, adapter, output, config, dtype)
        rope = json.loads((output / "config.json").read_text())["rope_parameters"]
        set_values(output / "config.json", rope_parameters=rope | {"rope_theta": 10000.0})

    monkeypatch.setattr(merge, "write_small_files", with_another_theta)
    with pytest.raises(FituneError, match="rope_parameters"):
        merge_adapter(base, adapter, tmp_path / "out", progress=False)
    assert json.loads((base / "config.json").read_text())["rope_parameters"]["rope_theta"] == 500000.0
