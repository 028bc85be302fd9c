"""Writes a checkpoint with random weights in the true shape of a Llama 3 model, for measuring without a download.

    python benchmarks/random_checkpoint.py OUTPUT --shape 70b --format nf4 [--layers 80] [--tokenizer FOLDER]

1B and 3B have one tensor for embedding and head, as in Llama 3.2. Weights are normal (0, 0.02); `nf4` is bitsandbytes'
format with double quantisation as written by save_pretrained.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fitune.weights.quantize import QUANTIZATION_CONFIG, is_quantised, nf4_parts, nf4_specs
from fitune.weights.safetensors_files import CheckpointWriter, TensorSpec

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads (config.json of each model on the Hub)
    "1b": (2048, 8192, 16, 32, 8),
    "3b": (3072, 8192, 28, 24, 8),
    "8b": (4096, 14336, 32, 32, 8),
    "70b": (8192, 28672, 80, 64, 8),
}
TIED = ("1b", "3b")
VOCABULARY = 128256
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(shape: str, layers: int | None) -> dict:
    hidden, intermediate, all_layers, heads, kv_heads = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers or all_layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "hidden_act": "silu", "tie_word_embeddings": shape in TIED,
        "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128001,
    }  # fmt: skip


def tensors(cfg: dict):
    """(name, shape) of every tensor, in the order of the layers."""
    hidden, inner = cfg["hidden_size"], cfg["intermediate_size"]
    kv = hidden // cfg["num_attention_heads"] * cfg["num_key_value_heads"]
    shapes = dict(zip(LINEARS, [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (inner, hidden),
                                (inner, hidden), (hidden, inner)], strict=True))  # fmt: skip
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for i in range(cfg["num_hidden_layers"]):
        for name, shape in shapes.items():
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            yield f"model.layers.{i}.{block}.{name}.weight", shape
        yield f"model.layers.{i}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{i}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not cfg["tie_word_embeddings"]:
        yield "lm_head.weight", (VOCABULARY, hidden)


def random_tensor(name: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(0.02)


def specs(name: str, shape: tuple[int, ...], fmt: str) -> list[TensorSpec]:
    if fmt == "nf4" and is_quantised(name, shape):
        return nf4_specs(name, shape)
    return [TensorSpec(name, torch.bfloat16, shape)]


def parts(name: str, tensor: torch.Tensor, fmt: str) -> dict[str, torch.Tensor]:
    """What is stored for one weight: itself, or its packed bytes and statistics."""
    return nf4_parts(name, tensor) if fmt == "nf4" and is_quantised(name, tuple(tensor.shape)) else {name: tensor}


def write(output: Path, shape: str, fmt: str, layers: int | None, device: str) -> None:
    cfg = config(shape, layers)
    output.mkdir(parents=True)
    torch.manual_seed(0)
    planned = [spec for name, size in tensors(cfg) for spec in specs(name, size, fmt)]
    writer = CheckpointWriter(output, planned, durable=False)
    for name, size in tensors(cfg):
        for key, value in parts(name, random_tensor(name, size, device), fmt).items():
            writer.write(key, value)
    writer.close()
    if fmt == "nf4":
        cfg["quantization_config"] = QUANTIZATION_CONFIG
    (output / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--format", choices=["bf16", "nf4"], default="nf4")
    parser.add_argument("--layers", type=int, help="fewer layers than the true model")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files are copied beside the weights")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write(options.output, options.shape, options.format, options.layers, device)
    for file in options.tokenizer.glob("*token*") if options.tokenizer else ():
        shutil.copy(file, options.output / file.name)


if __name__ == "__main__":
    main()
