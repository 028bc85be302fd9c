"""A base as QLoRA computes with it, a few rows at a time: bitsandbytes' values to the bit, wherever rows are cut."""

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_4bit
from safetensors.torch import save_file

from fitune.weights import base_weights, round_trip
from fitune.weights.quantize import nf4_parts
from fitune.weights.round_trip import WeightsThroughNF4
from fitune.weights.safetensors_files import Checkpoint

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = [(24, 40), (7, 96), (65, 72), (3, 33), (300, 256)]
"Rows of a part of a block, of blocks and a half, an odd number of weights, more than 256 blocks."


def _weight(shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)).bfloat16()


def _as_the_format_says(weight: torch.Tensor) -> torch.Tensor:
    """The code's value times its block's absmax, which is quantised too, rounded to bf16. No sum, so exact."""
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)[: weight.numel()]
    return (state.code[codes.long()] * absmax.repeat_interleave(64)[: weight.numel()]).view(weight.shape).bfloat16()


@pytest.mark.parametrize("chunk", [100, 2**24])
@pytest.mark.parametrize("stored", ["bf16", "nf4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_those_of_the_format_wherever_they_are_cut(shape, stored, chunk, tmp_path, monkeypatch):
    weight = _weight(shape)
    tensors = {NAME: weight} if stored == "bf16" else nf4_parts(NAME, weight)
    save_file(tensors, tmp_path / "model.safetensors")
    for module in (base_weights, round_trip):
        monkeypatch.setattr(module, "CHUNK_WEIGHTS", chunk)
    with Checkpoint(tmp_path) as checkpoint:
        weights = WeightsThroughNF4(checkpoint)
        chunks = weights.row_chunks(NAME)
        found = torch.cat([weights.rows(NAME, start, stop) for start, stop in chunks])
    assert torch.equal(found, _as_the_format_says(weight))
    assert len(chunks) > 1 or chunk > 100 or shape[0] < 64  # 33 weights a row: whole blocks take 64 rows
