"""What the tests of merge share: adapters as PEFT saves them, their logits, refusals."""

import json
import os
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fitune.errors import UsageError
from fitune.export.merge import merge_adapter

SIZES = {"num_layers": 2, "max_shard_bytes": 300_000}
TOKENS = [2043, 2046, 2044]  # not in order: rows follow the list
IDS = torch.tensor([[2037, 5, 77, 2043, 300, 2044, 9, 2046, 1200, 801]])
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def logits(folder, adapter=None, *, through_nf4=False) -> torch.Tensor:
    """By plain transformers and PEFT, in fp32 whatever the stored dtype, so that only stored values differ."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if through_nf4:
        model = put_through_nf4(model)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(IDS).logits


def put_through_nf4(model):
    """Each linear of the decoder layers as bitsandbytes' NF4 keeps it, statistics quantised too."""
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                stored = quantize_4bit(module.weight, compress_statistics=True, quant_type="nf4")
                module.weight.copy_(dequantize_4bit(*stored))
    return model


def set_values(file: Path, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(said, *arguments, kind=UsageError, **options):
    with pytest.raises(kind, match=said) as caught:
        merge_adapter(*arguments, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert not list(arguments[2].parent.glob(f"*{arguments[2].name}*"))


def truncate_shard(folder):
    file = sorted(folder.glob("model-*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size - 1)
