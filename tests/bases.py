"""Tiny bases of any architecture that fitune trains, and what plain transformers and PEFT compute on them."""

import json
import shutil
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA_3_1_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "llama3",
}
"How Llama 3.1 stretches its positions, from fewer of them."


def base_like(base: Path, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
    """A model with the sizes and the tokenizer of the folder `base` but for `changes` of its config.json, random.

    Norms, biases and all else are drawn, so that none can be left out unseen.
    """
    config = json.loads((base / "config.json").read_text()) | changes
    kind = config.pop("model_type")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            is_norm = name.endswith("norm.weight")
            nn.init.normal_(parameter, float(is_norm), 0.2 if is_norm or name.endswith("bias") else 0.1)
    model.to(dtype).save_pretrained(folder)
    for file in base.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def plain_model(folder: Path, method: str = "full", unpacked: torch.dtype | None = torch.float32) -> nn.Module:
    """transformers' own in float32; for method qlora with the weights that its 4 bits stand for.

    They are `unpacked` to that dtype, or to the one that is stored: as training on the CPU does, or as merge does.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    if method == "qlora":
        stored = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        with torch.no_grad():
            for name, module in model.model.layers.named_modules():
                if isinstance(module, nn.Linear):
                    packed, state = quantize_4bit(
                        stored.model.layers.get_submodule(name).weight, compress_statistics=True, quant_type="nf4"
                    )
                    state.dtype = unpacked or state.dtype
                    module.weight.copy_(dequantize_4bit(packed, state))
    return model


def with_adapter(model: nn.Module, r: int, alpha: float) -> nn.Module:
    """PEFT's adapter on all linears of `model`."""
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"))


def make_adapter(base: Path, folder: Path, **options) -> Path:
    """An adapter as PEFT saves it, with weights that change every logit."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    model.save_pretrained(folder, save_embedding_layers=False)
    file, generator = folder / "adapter_model.safetensors", torch.Generator().manual_seed(1)
    save_file({n: torch.randn(t.shape, generator=generator) * 0.05 for n, t in load_file(file).items()}, file)
    return folder
