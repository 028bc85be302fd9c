"""Fixtures for loading: checkpoints in bitsandbytes' format."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


@pytest.fixture(scope="module")
def nf4_bases(uneven_base, tmp_path_factory):
    """Checkpoints in bitsandbytes' format as transformers writes them: single, double, and packed in bfloat16."""
    options = {
        "double": {"bnb_4bit_use_double_quant": True},
        "single": {"bnb_4bit_use_double_quant": False},
        "stored as bf16": {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16},
    }
    folder, bases = tmp_path_factory.mktemp("nf4"), {}
    for name, option in options.items():
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **option
        )
        model = AutoModelForCausalLM.from_pretrained(
            uneven_base, dtype=torch.bfloat16, quantization_config=quantisation, device_map={"": "cpu"}
        )
        bases[name] = folder / name.replace(" ", "_")
        model.save_pretrained(bases[name], max_shard_size="200KB")
        AutoTokenizer.from_pretrained(uneven_base).save_pretrained(bases[name])
    return bases
