"""Whether what was written answers as base plus adapter do: logits of a few prompts, compared before it gets its name.

Three models compute side by side in float32, reading every weight once: base and adapter apart, as training computed;
base and adapter added and rounded at random to the precision that is written, which measures what rounding alone does
to this model's logits; and the files that were written.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fitune.config.base_model import ARCHITECTURES
from fitune.errors import FituneError
from fitune.export.rounding import StochasticRounding
from fitune.export.streamed_model import logits_side_by_side
from fitune.export.tuned_weights import TunedWeights
from fitune.weights.base_weights import BaseWeights, read_base_config
from fitune.weights.safetensors_files import Checkpoint

TIMES_ROUNDING = 4
"""How much more than one random rounding of the weights the files may differ, which are another."""
FLOAT32 = 1e-4
"Of the logits' size: what the order of float32 additions explains, where nothing was rounded."
PARTS = 3  # reference, rounded, written
NOT_THE_ARCHITECTURE = {
    *("dtype", "use_cache", "quantization_config", "_name_or_path", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


@dataclass(frozen=True)
class Comparison:
    """Of logits over all tokens of the prompts."""

    prompts: int
    tokens: int
    largest_difference: float
    bound: float
    "TIMES_ROUNDING the largest difference of the randomly rounded model, and FLOAT32."
    same_next_token: int
    "Tokens after which both models would go on with the same one."

    def __str__(self) -> str:
        return self.said()

    def said(self, compared_with: str = "base plus adapter") -> str:
        return (
            f"check: {self.prompts} prompts, {self.tokens} tokens: logits of what was written differ from "
            f"{compared_with} by at most {self.largest_difference:.2g} (bound {self.bound:.2g}); next token the same "
            f"after {self.same_next_token} of {self.tokens}"
        )

    @property
    def within_bound(self) -> bool:
        """Not where something is NaN."""
        return self.largest_difference <= self.bound

    def as_dict(self) -> dict:
        return asdict(self)


def not_computed(model: Path) -> str | None:
    """Why the logits of a folder's model cannot be computed here; None where they can."""
    kind = read_base_config(model).get("model_type")
    return None if kind in ARCHITECTURES else f"a {kind} model, the check computes {', '.join(ARCHITECTURES)}"


def check_written(written: Path, tuned: TunedWeights, dtype: torch.dtype, prompts: list[list[int]]) -> Comparison:
    """Compares the model folder `written` with `tuned` on token ids. FituneError if it differs beyond the bound."""
    comparison = compare_written(written, tuned, dtype, prompts)
    if not comparison.within_bound:
        raise FituneError(f"{comparison}: not the model that was trained, so nothing is left of it")
    return comparison


def compare_written(written: Path, tuned: TunedWeights, dtype: torch.dtype, prompts: list[list[int]]) -> Comparison:
    with Checkpoint(written) as checkpoint:
        return _compare(written, tuned, BaseWeights(checkpoint), dtype, prompts)


def refuse_another_architecture(written: Path, base: Path, changed: set[str]) -> None:
    """FituneError if config.json of `written` describes another model than the base's, but for keys in `changed`."""
    from transformers import AutoConfig

    found, expected = (
        AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict() for folder in (written, base)
    )
    for key in sorted({*found, *expected} - changed - NOT_THE_ARCHITECTURE):
        if found.get(key) != expected.get(key):
            raise FituneError(
                f"{written / 'config.json'}: {key} is {found.get(key)!r}, the base has {expected.get(key)!r}"
            )


def _compare(folder: Path, tuned: TunedWeights, written: BaseWeights, dtype, prompts) -> Comparison:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = _SideBySide(tuned, written, dtype, device)
    logits = logits_side_by_side(folder, weights, tuned.shapes, prompts, PARTS, tied=tuned.ties_head)
    longest = logits[0].shape[1]
    real = torch.arange(longest) < torch.tensor([[len(prompt)] for prompt in prompts])
    reference, rounded, found = (part[real] for part in logits)
    size = reference.square().mean().sqrt().item()
    return Comparison(
        prompts=len(prompts),
        tokens=int(real.sum()),
        largest_difference=_largest(found - reference),
        bound=TIMES_ROUNDING * _largest(rounded - reference) + FLOAT32 * size,
        same_next_token=int((found.argmax(-1) == reference.argmax(-1)).sum()),
    )


def _largest(difference: torch.Tensor) -> float:
    """NaN where one is."""
    return difference.abs().max().item()


class _SideBySide:
    """Weights of the three models: reference, rounded at random, written."""

    def __init__(self, tuned: TunedWeights, written: BaseWeights, dtype: torch.dtype, device: torch.device):
        self.tuned, self.written, self.dtype, self.device = tuned, written, dtype, device

    def product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        reference, rounded, found = x.to(self.device).chunk(PARTS)
        y = torch.empty(*x.shape[:2], self.tuned.shapes[name][0], device=self.device)
        of_reference, of_rounded, of_found = y.chunk(PARTS)
        adapted, rounding = _Adapted(self.tuned, name, reference), self._rounding(name)
        for start, stop in self.tuned.row_chunks(name):
            rows = self.tuned.base_rows(name, start, stop).to(self.device)
            of_reference[..., start:stop] = adapted.rows(rows, start, stop)
            merged = rounding(self.tuned.merge_into(rows, name, start, stop))
            of_rounded[..., start:stop] = rounded @ merged.float().T
        for start, stop in self.written.row_chunks(name):
            rows = self.written.rows(name, start, stop).to(self.device, torch.float32)
            of_found[..., start:stop] = found @ rows.T
        return y.cpu()

    def embed(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.chunk(PARTS)[0]
        used, place = ids.unique(return_inverse=True)
        reference = torch.cat([self._tuned_row(name, token) for token in used.tolist()])
        found = torch.cat([self.written.rows(name, token, token + 1) for token in used.tolist()])
        rounded = self._rounding(name)(reference.to(self.device, copy=True)).cpu()
        return torch.cat([rows.float()[place] for rows in (reference, rounded, found)])

    def vectors(self, name: str, rows: int) -> torch.Tensor:
        reference = self.tuned.base_rows(name, 0, self.tuned.shapes[name][0])
        rounded = self._rounding(name)(reference.to(self.device, copy=True)).float().cpu()
        found = self.written.read(name).float()
        return torch.stack([reference, rounded, found]).repeat_interleave(rows, dim=0).unsqueeze(1)

    def _tuned_row(self, name: str, token: int) -> torch.Tensor:
        return self.tuned.merge_into(self.tuned.base_rows(name, token, token + 1), name, token, token + 1)

    def _rounding(self, name: str) -> StochasticRounding:
        """With other random numbers than those that were written."""
        return StochasticRounding(f"check {name}", self.dtype, self.device)


class _Adapted:
    """x @ (W with the adapter)^T without adding the adapter to W: as PEFT computes."""

    def __init__(self, tuned: TunedWeights, name: str, x: torch.Tensor):
        self.x, self.parts = x, tuned.parts(name)
        self.tokens = tuned.lora.tokens[name][1] if name in tuned.lora.tokens else []
        self.is_embedding = name in tuned.lora.embeddings
        self.low = None  # x @ A^T; for an embedding that is the head too, x @ B
        if "scale" in self.parts:
            first = self.parts["b"] if self.is_embedding else self.parts["a"].T
            self.low = x @ first.to(x.device)

    def rows(self, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Outputs [start, stop) [rows, tokens, stop - start], for those rows of the base's weight."""
        y = self.x @ weight.T
        if self.low is not None:
            second = self.parts["a"][:, start:stop] if self.is_embedding else self.parts["b"][start:stop].T
            y = y + self.parts["scale"] * (self.low @ second.to(y.device))
        if "magnitude" in self.parts:
            y = y * self._dora_scale(weight, start, stop)
        for row, token in zip(self.parts.get("rows", ()), self.tokens, strict=True):
            if start <= token < stop:
                y[..., token - start] = self.x @ row.to(y.device)
        return y

    def _dora_scale(self, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        a, b = (self.parts[key].to(weight.device) for key in ("a", "b"))
        length = torch.linalg.norm(weight + self.parts["scale"] * (b[start:stop] @ a), dim=1)
        return self.parts["magnitude"][start:stop].to(weight.device) / length
