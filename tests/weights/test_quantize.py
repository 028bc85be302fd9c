"""`cli.py quantize`: bitsandbytes' own bytes, in a checkpoint that plain transformers reads."""

import json

import torch
from bitsandbytes.functional import quantize_4bit
from click.testing import CliRunner
from rounding import distance

from fitune.demo.tiny_base import build_tiny_base
from fitune.weights.quantize import is_quantised, quantize
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
