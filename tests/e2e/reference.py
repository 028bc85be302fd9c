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
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fitune.data.chat_template import read_tokenizer

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
            messages = json.loads(line)["messages"]
            ids = _tokens(tokenizer, messages)
            mask = torch.zeros(1, len(ids), dtype=torch.bool)
            for number, message in enumerate(messages):
                if message["role"] == "assistant":  # what comes after its prompt
                    prompt = _tokens(tokenizer, messages[:number], add_generation_prompt=True)
                    mask[0, len(prompt) : len(_tokens(tokenizer, messages[: number + 1]))] = True
            rows.append((torch.tensor([ids]), mask))
        return cls(rows)


def _tokens(tokenizer, messages: list[dict], **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]


@dataclass
class Bounds:
    """How far from float32 a computation in bf16 may be, measured on one base."""

    loss: float
    "Nats, of the mean over the held-out answers."
    logit_gap: float
    "Of the difference between two tokens' logits."
    token_spread: float
    shared_shift: float


class PlainModel:
    """A model of plain transformers in float32. All of them compute one at a time, whichever thread asks."""

    _lock = threading.Lock()

    def __init__(self, model: nn.Module, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self._answers: dict[str, str] = {}

    def loss(self, rows: Rows) -> float:
        """Nats, the mean over all answer tokens."""
        with self._lock:
            return torch.cat([token_losses(self.model, ids, mask)[0] for ids, mask in rows.tokens]).mean().item()

    @torch.no_grad()
    def answer(self, messages: list[dict], new_tokens: int) -> str:
        """The greedy one."""
        prompt = self._prompt(messages)
        with self._lock:
            if prompt not in self._answers:
                inputs = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
                stop = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.eos_token_id}
                output = self.model.generate(**inputs, **stop, do_sample=False, max_new_tokens=new_tokens)
                said = output[0, inputs["input_ids"].shape[1] :]
                self._answers[prompt] = self.tokenizer.decode(said, skip_special_tokens=True).strip()
            return self._answers[prompt]

    @torch.no_grad()
    def gap_where_they_part(self, messages: list[dict], one: str, other: str) -> float:
        """0 for equal answers, else the difference of logits between the tokens at which they first differ."""
        prompt = self._prompt(messages)
        ids = [
            self.tokenizer(prompt + text + self.tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            for text in (one, other)
        ]
        place = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), None)
        if place is None:
            return 0.0
        with self._lock:
            logits = self.model(input_ids=torch.tensor([ids[0][:place]])).logits[0, -1]
        return (logits[ids[0][place]] - logits[ids[1][place]]).abs().item()

    @torch.no_grad()
    def measure_bf16(self, rows: Rows) -> Bounds:
        """Computes `rows` in float32 and in bf16."""
        with self._lock:
            exact = [token_losses(self.model, ids, mask) for ids, mask in rows.tokens]
            self.model.to(torch.bfloat16)
            rounded = [
                token_losses(self.model, ids, mask, first_two)
                for (ids, mask), (_, _, first_two) in zip(rows.tokens, exact, strict=True)
            ]
        loss, gap = (torch.cat([row[part] for row in exact]) for part in (0, 1))
        loss_bf16, gap_bf16 = (torch.cat([row[part] for row in rounded]) for part in (0, 1))
        shift, spread = (loss_bf16 - loss).mean().abs().item(), (loss_bf16 - loss).std().item()
        bound = shift + 6 * spread / math.sqrt(len(loss))
        gap_spread = (gap_bf16 - gap).square().mean().sqrt().item()
        return Bounds(bound, 6 * gap_spread, spread, shift)

    def _prompt(self, messages: list[dict]) -> str:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@torch.no_grad()
def token_losses(model, ids, mask, first_two=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each answer token of a row: its loss, the gap between the first two tokens' logits, and who these are."""
    logits = model(input_ids=ids).logits[0, :-1].float()[mask[0, 1:]]
    targets = ids[0, 1:][mask[0, 1:]]
    first_two = logits.topk(2).indices if first_two is None else first_two
    pair = logits.gather(1, first_two)
    return nn.functional.cross_entropy(logits, targets, reduction="none"), pair[:, 0] - pair[:, 1], first_two


@dataclass
class Base:
    """A base without what a run has learned."""

    plain: PlainModel
    loss: float
    bounds: Bounds


class Reference:
    """Plain models over the weights in `folder`, as they are ("bf16") or as NF4 keeps them ("nf4")."""

    def __init__(self, folder: Path, held_out: Path, threads: int):
        torch.set_num_threads(threads)
        self.folder, self._lock = folder, threading.Lock()
        self.tokenizer = read_tokenizer(folder)
        self.rows = Rows.read(held_out, self.tokenizer)
        self._bases: dict[str, Base] = {}

    def base(self, weights: str) -> Base:
        with self._lock:
            if weights not in self._bases:
                plain, copy = (PlainModel(self._load(weights), self.tokenizer) for _ in range(2))
                self._bases[weights] = Base(plain, plain.loss(self.rows), copy.measure_bf16(self.rows))
            return self._bases[weights]

    def tuned(self, weights: str, result: Path) -> PlainModel:
        """What a run trained: its adapter over `weights`, or its whole model."""
        with self._lock:
            if (result / "config.json").exists():
                return PlainModel(_load(result), self.tokenizer)
            from peft import PeftModel

            with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # between PEFT and transformers
                model = PeftModel.from_pretrained(self._load(weights), result).eval()
            return PlainModel(model, self.tokenizer)

    def _load(self, weights: str) -> nn.Module:
        model = _load(self.folder)
        return _through_nf4(model) if weights == "nf4" else model


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
