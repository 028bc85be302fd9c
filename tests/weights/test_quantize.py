"""`cli.py quantize`: bitsandbytes' own bytes, in a checkpoint that plain transformers reads."""

import json
import re

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from click.testing import CliRunner
from rounding import distance

from fitune.demo.tiny_base import build_tiny_base
from fitune.weights import quantize as quantising
from fitune.weights.quantize import is_quantised, nf4_parts, quantize
from fitune.weights.safetensors_files import Checkpoint

CPU = torch.device("cpu")


def test_bytes_equal_bitsandbytes_and_transformers_reads_them(plain_linear4bit, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = build_tiny_base(tmp_path / "base", num_layers=2)
    (base / "LICENSE").write_text("as you like")
    output = quantize(base, tmp_path / "nf4", CPU)
    assert (output / "LICENSE").read_text() == "as you like"
    settings = json.loads((output / "config.json").read_text())["quantization_config"]
    assert settings["bnb_4bit_use_double_quant"] is True
    with Checkpoint(base) as source, Checkpoint(output) as written:
        for name, info in source.tensors.items():
            if is_quantised(name, info.shape):
                packed, state = quantize_4bit(source.read(name), compress_statistics=True, quant_type="nf4")
                assert torch.equal(written.read(name), packed)
                assert torch.equal(written.read(f"{name}.absmax"), state.absmax)
                assert torch.equal(written.read(f"{name}.nested_absmax"), state.state2.absmax)
            else:
                assert torch.equal(written.read(name), source.read(name))
        assert sum("absmax" in name for name in written.tensors) == 2 * 7 * 2
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert model.is_loaded_in_4bit
    tokens = AutoTokenizer.from_pretrained(output)("Name three colours.", return_tensors="pt")
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        quantised, exact = model(**tokens).logits, reference(**tokens).logits
    assert 0.01 < distance(quantised, exact) < 0.35, "4-bit rounding, neither nothing nor noise"


def test_a_quantised_model_or_an_existing_output_is_refused(tmp_path):
    from fitune.cli import cli

    base = build_tiny_base(tmp_path / "base", num_layers=1)
    quantize(base, tmp_path / "nf4", CPU)
    again = CliRunner().invoke(cli, ["quantize", str(tmp_path / "nf4"), "--output", str(tmp_path / "twice")])
    assert (again.exit_code, "is quantised already" in again.output) == (2, True)
    assert not (tmp_path / "twice").exists()
    onto = CliRunner().invoke(cli, ["quantize", str(base), "--output", str(tmp_path / "nf4")])
    assert (onto.exit_code, "exists already" in onto.output) == (2, True)


def quantize_command(*words):
    from fitune.cli import cli

    return CliRunner().invoke(cli, ["quantize", *map(str, words)])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base") / "base", num_layers=1)


def test_what_was_written_is_compared_with_the_base_in_nf4(base, tmp_path):
    """Not with the base's own weights, from which 4 bits are far away."""
    checked = quantize_command(base, "--output", tmp_path / "nf4")
    assert checked.exit_code == 0, checked.output
    [line] = [line for line in checked.stderr.splitlines() if line.startswith("check: ")]
    largest, bound, same, tokens = map(
        float, re.search(r"the base in NF4 by at most (\S+) \(bound (\S+)\); .* after (\d+) of (\d+)", line).groups()
    )
    assert largest <= bound < 1e-2 and same == tokens > 0
    unchecked = quantize_command(base, "--output", tmp_path / "unchecked", "--no-check")
    assert unchecked.exit_code == 0 and "check" not in unchecked.stderr


@pytest.mark.parametrize("damage", ["a matrix in another order", "a norm that is another", "not a number"])
def test_another_model_than_the_base_in_nf4_is_refused(base, tmp_path, monkeypatch, damage):
    write = quantising.CheckpointWriter.write

    def in_another_order(name, weight):
        return nf4_parts(name, weight.flip(0) if name.endswith("down_proj.weight") else weight)

    def damaged(self, name, tensor):
        if name == "model.norm.weight":
            tensor = tensor * 1.01 if damage == "a norm that is another" else torch.full_like(tensor, torch.nan)
        write(self, name, tensor)

    if damage == "a matrix in another order":
        monkeypatch.setattr(quantising, "nf4_parts", in_another_order)
    else:
        monkeypatch.setattr(quantising.CheckpointWriter, "write", damaged)
    outcome = quantize_command(base, "--output", tmp_path / "nf4")
    assert outcome.exit_code == 1, outcome.output
    assert "not the base's weights, so nothing is left of it" in outcome.stderr
    assert not list(tmp_path.iterdir())


def test_a_config_of_another_model_is_refused(base, tmp_path, monkeypatch):
    read = quantising.read_base_config
    monkeypatch.setattr(quantising, "read_base_config", lambda folder: read(folder) | {"rms_norm_eps": 0.1})
    outcome = quantize_command(base, "--output", tmp_path / "nf4")
    assert outcome.exit_code == 1 and "rms_norm_eps is 0.1, the base has" in outcome.stderr, outcome.output
    assert not list(tmp_path.iterdir())
