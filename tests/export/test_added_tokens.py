"""Adapters of a base whose vocabulary was made larger first: PEFT saves embedding and head with their wrappers."""

import pytest
import torch
from adapters import ATTENTION, IDS, logits
from peft import LoraConfig, get_peft_model
from rounding import additions_to_logits, assert_equal_but_for_rounding
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fitune.errors import UsageError
from fitune.export.merge import merge_adapter
from fitune.training.given_model import given_model
from fitune.training.load_given import load_plain

ADDED = 8
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
VARIANTS = {
    "LoRA alone": {},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head": {"modules_to_save": ["lm_head"]},
    "added tokens": {"trainable_token_indices": "added"},
}


def _adapter(base, folder, options: dict) -> torch.Tensor:
    """Saves one that changes whatever it trains; returns what the model answers with it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = model.config.vocab_size
    if "trainable_token_indices" in options:
        options = options | {"trainable_token_indices": [tokens, tokens + 2]}
    torch.manual_seed(0)
    model.resize_token_embeddings(tokens + ADDED)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
        expected = model.eval()(IDS).logits
    model.save_pretrained(folder)
    return expected


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_they_are_merged_with_their_tokens(options, base, tmp_path):
    expected = _adapter(base, tmp_path / "adapter", options)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "out", dtype=torch.float32, progress=False)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.vocab_size == expected.shape[-1] == AutoConfig.from_pretrained(base).vocab_size + ADDED
    added = additions_to_logits(config, IDS.shape[1]) + 5 * 7 * config.num_hidden_layers
    assert_equal_but_for_rounding(logits(tmp_path / "out"), expected, added)


def test_two_tensors_for_one_weight_are_the_same_or_refused(base, tmp_path):
    _adapter(base, tmp_path / "adapter", VARIANTS["head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{HEAD}.weight"][3] += 1
    save_file(tensors, file)
    with pytest.raises(UsageError, match=r"lm_head\.weight stand for one weight, and differ"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "out", progress=False)


def test_tokens_beyond_the_embedding_are_refused(base, tmp_path):
    _adapter(base, tmp_path / "adapter", VARIANTS["added tokens"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    shorter = {name: tensor[:-ADDED] if name.endswith("base_layer.weight") else tensor
               for name, tensor in load_file(file).items() if HEAD not in name}  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in shorter.items()}, file)
    with pytest.raises(UsageError, match=rf"{EMBEDDING}\.weight: the adapter is for shape .*; wrong base"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "out", progress=False)


def test_one_that_cannot_be_asked_beside_its_base_says_what_can(base, tmp_path):
    _adapter(base, tmp_path / "adapter", VARIANTS["embedding and head"])
    with pytest.raises(UsageError, match=r"size mismatch .*; merge it, and give the merged model's folder"):
        load_plain(given_model(tmp_path / "adapter"))
