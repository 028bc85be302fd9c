"""What plain transformers and PEFT compute on the CPU in float32, and how far bf16 may be from it.

How the bounds come about: each rounding to bf16 is off by up to 2^-9 of the value, thirty layers make thousands, and
what they add up to depends on the model. So it is measured: plain transformers computes the same rows in bf16 as well.
Take the differences between its token losses and those in float32. Their mean m is what any computation in bf16 shares,
their spread s is what the order of its sums decides. Another one's mean over N tokens lies within |m| + 6 s / sqrt(N)
of float32: six standard errors, as the tokens of a row are not quite independent. In the same way, two tokens may
change places if their logits differ by less than six times the spread of such differences.
"""

import json
import math
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fitune.data.chat_template import apply_chat_template_choice, read_tokenizer

FLOAT32 = 1e-5
"Relative: losses of float32 sums in another order differ by a few units in the sixth digit."


@dataclass
class Rows:
    """The held-out rows as tokens: pairs of ids [1, T] and a mask [1, T] of what is answered."""

    tokens: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def read(cls, file: Path, tokenizer) -> "Rows":
        rows = []
        for line in file.read_text(encoding="utf-8").splitlines():
            encoded = tokenizer.apply_chat_template(
                json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
            )
            rows.append((encoded["input_ids"], encoded["assistant_masks"].bool()))
        return cls(rows)


@dataclass
class Bounds:
    """How far from float32 a computation in bf16 may be, measured on one base."""

    loss: float
    "Nats, of the mean over the held-out answers."
    logit_gap: float
    "Of the difference between two tokens' logits."
    token_spread: float
    shared_shift: float


class Reference:
    """Losses and answers by plain transformers. One computation at a time, whichever thread asks."""

    def __init__(self, bases: dict[str, Path], held_out: Path, template: Path, threads: int):
        torch.set_num_threads(threads)
        self.bases, self.lock = bases, threading.Lock()
        self.tokenizer = read_tokenizer(bases["bf16"])
        apply_chat_template_choice(self.tokenizer, str(template))
        self.rows = Rows.read(held_out, self.tokenizer)
        self._known: dict[str, tuple[float, Bounds]] = {}

    def of_base(self, base: str) -> tuple[float, Bounds]:
        """The loss of a base in float32, and what bf16 may make of it."""
        kind = "nf4" if base == "nf4" else "bf16"  # the untied copy has the same weights
        with self.lock:
            if kind not in self._known:
                self._known[kind] = self._measure(self._load_base(kind))
        return self._known[kind]

    def of_result(self, base: str, result: Path) -> tuple[float, nn.Module]:
        """The loss of what a run trained, its adapter over `base` or its whole model, and that model in float32."""
        with self.lock:
            model = self._load_result(base, result)
            losses = torch.cat([self._token_losses(model, ids, mask)[0] for ids, mask in self.rows.tokens])
            return losses.mean().item(), model

    @torch.no_grad()
    def gap_where_they_part(self, model: nn.Module, messages: list[dict], one: str, other: str) -> float:
        """0 for equal answers, else the difference of logits between the tokens at which they first differ."""
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = [
            self.tokenizer(prompt + text + self.tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            for text in (one, other)
        ]
        place = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), None)
        if place is None:
            return 0.0
        with self.lock:
            logits = model(input_ids=torch.tensor([ids[0][:place]])).logits[0, -1]
        return (logits[ids[0][place]] - logits[ids[1][place]]).abs().item()

    @torch.no_grad()
    def _measure(self, model: nn.Module) -> tuple[float, Bounds]:
        exact = [self._token_losses(model, ids, mask) for ids, mask in self.rows.tokens]
        model = model.to(torch.bfloat16)
        rounded = [
            self._token_losses(model, ids, mask, first_two)
            for (ids, mask), (_, _, first_two) in zip(self.rows.tokens, exact, strict=True)
        ]
        loss, gap = (torch.cat([row[part] for row in exact]) for part in (0, 1))
        loss_bf16, gap_bf16 = (torch.cat([row[part] for row in rounded]) for part in (0, 1))
        shift, spread = (loss_bf16 - loss).mean().abs().item(), (loss_bf16 - loss).std().item()
        bound = shift + 6 * spread / math.sqrt(len(loss))
        gap_spread = (gap_bf16 - gap).square().mean().sqrt().item()
        return loss.mean().item(), Bounds(bound, 6 * gap_spread, spread, shift)

    @torch.no_grad()
    def _token_losses(self, model, ids, mask, first_two=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each answer token of a row: its loss, the gap between the first two tokens' logits, and who these are."""
        logits = model(input_ids=ids).logits[0, :-1].float()[mask[0, 1:]]
        targets = ids[0, 1:][mask[0, 1:]]
        first_two = logits.topk(2).indices if first_two is None else first_two
        pair = logits.gather(1, first_two)
        return nn.functional.cross_entropy(logits, targets, reduction="none"), pair[:, 0] - pair[:, 1], first_two

    def _load_base(self, base: str) -> nn.Module:
        model = _load(self.bases["bf16"])
        return _through_nf4(model) if base == "nf4" else model

    def _load_result(self, base: str, result: Path) -> nn.Module:
        if (result / "config.json").exists():
            return _load(result)
        from peft import PeftModel

        return PeftModel.from_pretrained(self._load_base(base), result).eval()


def _load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _through_nf4(model: nn.Module) -> nn.Module:
    """Each linear of the decoder layers as bitsandbytes' NF4 keeps it, statistics quantised too, in float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                stored = quantize_4bit(module.weight, compress_statistics=True, quant_type="nf4")
                module.weight.copy_(dequantize_4bit(*stored))
    return model
