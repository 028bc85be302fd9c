"""Why the first losses with small states lie below float32's: how much of an update the next pass can see.

    python benchmarks/first_losses.py RESULT.json [--model FOLDER] [--steps 20]

A model trained in full on the CPU from the same weights, bf16 numbers, and rows: AdamW in float32 that computes with
its weights as they are, the same with its weights rounded to bf16 for each pass, as on GPUs, and bf16_8bit; also bf16
weights with float32 moments, which sets apart what the 8 bits do. Products are in float32 in all of them. Without
`--model` a Llama with random weights, normal (0, 0.02), on tokens drawn by Zipf's law.

For the first update at full rate, in which all gradients are the same, and each tensor: the share of float32's update
that the weights moved by, <moved, exact> / <exact, exact>. It is 1 where updates are right on average.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tier_run import about

from fitune.optimizers import adamw_8bit
from fitune.optimizers.adamw_8bit import AdamW8bit

RATE, WEIGHT_DECAY, CLIP = 1e-5, 0.0, 1.0
ROWS, LENGTH = 2, 128
ZIPF = 1.1
EXACT = "AdamW, float32, computed with as they are"
KINDS = {  # name -> (dtype of the weights that are trained, whether a pass sees them rounded, moments of 8 bits)
    EXACT: (torch.float32, False, False),
    "AdamW, float32, rounded to bf16 for each pass": (torch.float32, True, False),
    "bf16 weights, float32 moments": (torch.bfloat16, True, False),
    "bf16_8bit": (torch.bfloat16, True, True),
}


def random_model(layers: int = 8, hidden: int = 256, vocabulary: int = 8192) -> LlamaForCausalLM:
    """Its weights are bf16 numbers in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=vocabulary, initializer_range=0.02, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16().float()


def batches(vocabulary: int, steps: int) -> list[torch.Tensor]:
    """Tokens [rows, length] of each step."""
    drawn = torch.Generator().manual_seed(1)
    weights = torch.arange(1, vocabulary + 1, dtype=torch.float64) ** -ZIPF
    weights = weights[torch.randperm(vocabulary, generator=drawn)]
    return [
        torch.multinomial(weights, ROWS * LENGTH, replacement=True, generator=drawn).view(ROWS, LENGTH)
        for _ in range(steps)
    ]


def rates(steps: int) -> list[float]:
    """As full_runs.json's runs have them: one step of warmup, whose rate is 0, then a cosine."""
    angles = torch.arange(steps - 1, dtype=torch.float64) / (steps - 1) * torch.pi
    return [0.0, *(RATE * (1 + angles.cos()) / 2).tolist()]


def optimizer_of(weights: list[nn.Parameter], dtype: torch.dtype) -> torch.optim.Optimizer:
    if dtype == torch.float32:
        return torch.optim.AdamW(weights, lr=RATE, weight_decay=WEIGHT_DECAY)
    return AdamW8bit(weights, lr=RATE, weight_decay=WEIGHT_DECAY, seed=42)


def trained(model: nn.Module, kind: str, data: list[torch.Tensor]) -> dict:
    """Losses, norms, and by tensor what the weights had moved by after the second step, as the next pass sees it."""
    dtype, rounded, eight_bit = KINDS[kind]
    with nullcontext() if eight_bit else mock.patch.object(adamw_8bit, "block_of", lambda weight: None):
        return _trained(model, dtype, rounded, data)


def _trained(model: nn.Module, dtype: torch.dtype, rounded: bool, data: list[torch.Tensor]) -> dict:
    names, seen = zip(*model.named_parameters(), strict=True)
    start = [weight.detach().clone() for weight in seen]
    weights = [nn.Parameter(weight.to(dtype, copy=True)) for weight in start]
    optimizer = optimizer_of(weights, dtype)
    found = {"losses": [], "grad_norms": []}
    for step, (tokens, rate) in enumerate(zip(data, rates(len(data)), strict=True)):
        _show(weights, seen, rounded)
        if step == 2:
            found["moved"] = {name: (a.detach() - b).flatten() for name, a, b in zip(names, seen, start, strict=True)}
        model.zero_grad()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        for weight, shown in zip(weights, seen, strict=True):
            weight.grad = shown.grad.to(dtype)
        norm = _clip(optimizer, weights)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        found["losses"].append(loss.item())
        found["grad_norms"].append(float(norm))
    with torch.no_grad():
        for shown, weight in zip(seen, start, strict=True):
            shown.copy_(weight)
    return found


@torch.no_grad()
def _show(weights: list[nn.Parameter], seen: tuple[nn.Parameter, ...], rounded: bool) -> None:
    for weight, shown in zip(weights, seen, strict=True):
        shown.copy_(weight.bfloat16() if rounded else weight)


def _clip(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> torch.Tensor:
    if isinstance(optimizer, AdamW8bit):
        return optimizer.clip(CLIP)
    return nn.utils.clip_grad_norm_(weights, CLIP)


def shares(moved: dict, exact: dict) -> dict[str, float]:
    """By kind of tensor: the share of the exact update that the weights moved by; "all" for all of them."""
    dots: dict[str, list[float]] = {}
    for name, update in exact.items():
        for key in (_kind_of(name), "all"):
            sums = dots.setdefault(key, [0.0, 0.0])
            sums[0] += float(moved[name].double() @ update.double())
            sums[1] += float(update.double() @ update.double())
    return {key: round(with_moved / with_itself, 4) for key, (with_moved, with_itself) in dots.items()}


def _kind_of(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    given = AutoModelForCausalLM.from_pretrained(options.model).bfloat16().float() if options.model else None
    model = given or random_model()
    data = batches(model.config.vocab_size, options.steps)
    found = {kind: trained(model, kind, data) for kind in KINDS}
    exact = found[EXACT]["moved"]
    runs = {
        kind: {"losses": one["losses"], "grad_norms": one["grad_norms"], "share_of_update": shares(one["moved"], exact)}
        for kind, one in found.items()
    }
    report = {
        "benchmark": "the first losses of full fine-tuning with float32 and with small states, on the CPU",
        **about(options.commit), "command": " ".join(["python", *sys.argv]), "learning_rate": RATE,
        "model": options.model.name if options.model else "random, 8 layers of 256, normal (0, 0.02)", "runs": runs,
    }  # fmt: skip
    options.result.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for kind, one in runs.items():
        print(f"{kind}: {' '.join(f'{loss:.4f}' for loss in one['losses'])}; share {one['share_of_update']}")


if __name__ == "__main__":
    main()
