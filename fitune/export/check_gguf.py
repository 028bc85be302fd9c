"""Whether a GGUF file answers as the model's folder does that it was made of: llama.cpp's against plain float32.

Two models compute side by side in float32, reading every weight once: the folder's, and the folder's with weights and
what they are multiplied with rounded to the file's type, which measures what that type alone does to this model.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fitune.config.schema import Run
from fitune.config.stored_weights import EMBEDDING, HEAD
from fitune.errors import FituneError
from fitune.export.check import not_computed
from fitune.export.gguf_answers import LIKELIEST, Answers, ask_gguf
from fitune.export.llama_cpp import INSTALL, is_installed
from fitune.export.prompts import prompts_for
from fitune.export.streamed_model import logits_side_by_side
from fitune.weights.base_weights import BaseWeights, unpacked_shapes
from fitune.weights.safetensors_files import Checkpoint

TIMES_ROUNDING = 2
"How much more llama.cpp may differ than the rounding to the file's type does, as it rounds at other places too."
TIMES_FEW_BITS = 8
"The same below 8 bits, whose types place their steps in ways of their own: gross damage alone is refused there."
OF_UNRELATED = 1 / 2
"Below 8 bits, the bound at most, of what the model's own answers differ from those at another place."
EVERY = 4
"After each how many tokens of a prompt llama.cpp is asked for the next."
BLOCK = 32
"Weights that share a scale in the types below 16 bits."
PARTS = 2  # reference, rounded


@dataclass(frozen=True)
class GgufComparison:
    """Of the log-probabilities of the tokens that llama.cpp holds likeliest, after some beginnings of the prompts."""

    file: str
    prompts: int
    places: int
    mean_difference: float
    bound: float
    "Of the mean difference: see `_bound`."
    largest_difference: float
    same_next_token: int

    def __str__(self) -> str:
        return (
            f"check: {self.file}: {self.prompts} prompts: log-probabilities of next tokens by llama.cpp differ from "
            f"the model's by {self.mean_difference:.2g} on average (bound {self.bound:.2g}), by at most "
            f"{self.largest_difference:.2g}; next token the same after {self.same_next_token} of {self.places} places"
        )


def check_gguf(files: dict[Path, str], model: Path, run: Run | None = None) -> None:
    """Compares `files`, each with its type, with the folder `model`, and prints what it found, or why it did not.

    It asks what the check of a merge asks, of `run` if there is one. FituneError for a file that differs beyond the
    bound, or that llama.cpp cannot load.
    """
    names = ", ".join(file.name for file in files)
    if reason := not_computed(model):
        print(f"check: {names}: not checked: {reason}", file=sys.stderr)
    elif not is_installed():
        print(f"check: {names}: not checked, as llama.cpp is not installed: {INSTALL}", file=sys.stderr)
    else:
        with Checkpoint(model) as checkpoint:
            vocabulary = unpacked_shapes(checkpoint)[EMBEDDING][0]
        prompts = prompts_for(model, run, vocabulary)
        for file, of_file in files.items():
            compared = compare_gguf(file, of_file, model, prompts, ask_gguf)
            if not compared.mean_difference <= compared.bound:
                raise FituneError(f"{compared}: not the model that was converted, so nothing is left of it")
            print(compared, file=sys.stderr)


def compare_gguf(file: Path, kind: str, model: Path, prompts: list[list[int]], ask) -> GgufComparison:
    """`ask`, given the file and beginnings of the prompts, returns the answers, as `ask_gguf` does."""
    places = [(row, end) for row, prompt in enumerate(prompts) for end in _ends(len(prompt))]
    answers = ask(file, [prompts[row][:end] for row, end in places])
    reference, rounded = _log_probabilities(model, kind, prompts, places)
    _refuse_other_answers(file, answers, len(places), reference.shape[1])
    tokens = [[token for token, _ in answer] for answer in answers]
    found = torch.tensor([probability for answer in answers for _, probability in answer])
    expected, of_rounded = (
        torch.cat([part[place, of_place] for place, of_place in enumerate(tokens)]) for part in (reference, rounded)
    )
    likeliest = reference.argmax(-1).tolist()
    return GgufComparison(
        file=file.name,
        prompts=len(prompts),
        places=len(places),
        mean_difference=_mean(found - expected),
        bound=_bound(kind, _mean(of_rounded - expected), reference),
        largest_difference=(found - expected).abs().max().item(),
        same_next_token=sum(of_place[0] == best for of_place, best in zip(tokens, likeliest, strict=True)),
    )


def _ends(length: int) -> list[int]:
    return sorted({*range(EVERY, length, EVERY), length})


def _refuse_other_answers(file: Path, answers: Answers, places: int, vocabulary: int) -> None:
    of_the_vocabulary = all(answer and all(0 <= token < vocabulary for token, _ in answer) for answer in answers)
    if len(answers) != places or not of_the_vocabulary:
        raise FituneError(f"{file}: llama.cpp gives no tokens of the model's vocabulary: another tokenizer's file?")


def _mean(difference: torch.Tensor) -> float:
    """NaN where one is."""
    return difference.abs().mean().item()


def _bound(kind: str, of_rounding: float, reference: torch.Tensor) -> float:
    """The mean difference that is allowed where rounding to the type alone makes `of_rounding`.

    In 2 or 3 bits even steps leave nothing of a small model, so that eight times theirs would allow anything. Answers
    that are half as far off as the model's own at another place, `reference` [places, vocabulary], are no answers.
    """
    if _bits(kind) >= 8:
        return TIMES_ROUNDING * of_rounding
    likeliest = reference.topk(min(LIKELIEST, reference.shape[1]))
    elsewhere = reference.roll(1, 0).gather(1, likeliest.indices)
    return min(TIMES_FEW_BITS * of_rounding, OF_UNRELATED * _mean(likeliest.values - elsewhere))


def _log_probabilities(model: Path, kind: str, prompts, places) -> torch.Tensor:
    """Of each next token at each place [PARTS, places, vocabulary], on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Checkpoint(model) as checkpoint:
        stored = BaseWeights(checkpoint)
        weights, tied = _SideBySide(stored, kind, device), HEAD not in stored.shapes
        logits = logits_side_by_side(model, weights, stored.shapes, prompts, PARTS, tied=tied)
    rows, ends = (torch.tensor(column) for column in zip(*places, strict=True))
    return torch.stack([part[rows, ends - 1].log_softmax(-1) for part in logits])


class _SideBySide:
    """Weights of the two models: as stored, and rounded to the file's type."""

    def __init__(self, stored: BaseWeights, kind: str, device: torch.device):
        self.stored, self.kind, self.device = stored, kind, device

    def product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        exact, rounded = x.to(self.device).chunk(PARTS)
        rounded = round_to(self.kind if _bits(self.kind) > 8 else "q8_0", rounded)
        y = torch.empty(*x.shape[:2], self.stored.shapes[name][0], device=self.device)
        of_exact, of_rounded = y.chunk(PARTS)
        for start, stop in self.stored.row_chunks(name):
            rows = self.stored.rows(name, start, stop).to(self.device, torch.float32)
            of_exact[..., start:stop] = exact @ rows.T
            of_rounded[..., start:stop] = rounded @ round_to(self.kind, rows).T
        return y.cpu()

    def embed(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        used, place = ids.chunk(PARTS)[0].unique(return_inverse=True)
        rows = torch.cat([self.stored.rows(name, token, token + 1) for token in used.tolist()]).float()
        return torch.cat([rows[place], round_to(self.kind, rows)[place]])

    def vectors(self, name: str, rows: int) -> torch.Tensor:
        """Files hold them in float32."""
        return self.stored.read(name).float().repeat(PARTS * rows, 1).unsqueeze(1)


def round_to(kind: str, x: torch.Tensor) -> torch.Tensor:
    """float32 `x` to a type of GGUF and back: f16, bf16, or even steps between the extremes of each block."""
    if kind in ("f16", "bf16"):
        return x.to(torch.float16 if kind == "f16" else torch.bfloat16).float()
    blocks = x.unflatten(-1, (-1, math.gcd(x.shape[-1], BLOCK)))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    if kind == "q8_0":
        high = torch.maximum(high, -low)
        low = -high
    step = ((high - low) / (2 ** _bits(kind) - (2 if kind == "q8_0" else 1))).clamp_min(torch.finfo(x.dtype).tiny)
    return (((blocks - low) / step).round() * step + low).flatten(-2)


def _bits(kind: str) -> int:
    """Of a weight: the number in the type's name."""
    return int(re.search(r"\d+", kind).group())
