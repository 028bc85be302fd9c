"""Fixtures for merging: a tiny base in bf16 and NF4, an adapter, copies that a test may damage."""

import shutil
from pathlib import Path

import pytest
import torch
from adapters import SIZES, TOKENS
from bases import make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fitune.demo.tiny_base import build_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base") / "base", **SIZES)


@pytest.fixture(scope="module")
def nf4_base(base, tmp_path_factory):
    """The base as transformers + bitsandbytes save it in 4 bits."""
    folder = tmp_path_factory.mktemp("nf4") / "base"
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), trainable_token_indices={"embed_tokens": TOKENS})


@pytest.fixture
def own_adapter(adapter, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(adapter, tmp_path / "own_adapter"))


@pytest.fixture
def own_base(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "own_base"))
