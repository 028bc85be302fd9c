"""How far two ways to compute the same values may lie apart: one rule, so that it holds on every processor.

Kernels add in an order of their own, which depends on the instruction set, the number of threads, the library and the
shapes. Each addition rounds to within eps / 2 of the sum so far, up as often as down. So a value that n roundings lead
to is off by about eps / 2 * sqrt(n) of what was added. Where terms cancel the value is small but its error is not: the
scale is that of the whole tensor, as its norm gives it.

Not for what must be equal to the bit: bytes that are only moved or copied, and the same code with the same shapes on
the same machine, as when a run is resumed.
"""

import math

import torch
from transformers import LlamaConfig

from fitune.config.schema import Run

AMPLIFICATION = 8
"There are two computations, each with such an error, and norms and softmaxes enlarge what they are given."


def rounding(roundings: int, dtype: torch.dtype = torch.float32) -> float:
    """What may lie between two computations with so many roundings to `dtype` in a row, relative to the values."""
    return AMPLIFICATION * torch.finfo(dtype).eps / 2 * math.sqrt(roundings)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, Euclidean norms of whole tensors."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm()).item()


def additions_to_logits(config: LlamaConfig, length: int) -> int:
    """In a row, from a token's embedding to its logits, in a row of `length` tokens."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    attention = hidden + hidden + head + 2 * length + heads * head  # norm, q, scores, softmax and values, o
    mlp = hidden + hidden + config.intermediate_size  # norm, gate, down
    return config.num_hidden_layers * (attention + mlp + 2) + 2 * hidden  # two residuals; the last norm and the head


def additions_to_gradients(config: LlamaConfig, length: int, tokens: int) -> int:
    """From the embedding to the loss and back to the gradient of a weight, which sums over `tokens` tokens."""
    return (
        3 * additions_to_logits(config, length) + 2 * config.vocab_size + 2 * tokens
    )  # backward: two products for one


def additions_to_a_step(run: Run) -> int:
    """To the gradient of one step of training, as if all its rows were of `max_length`."""
    recipe = run.recipe
    config = LlamaConfig.from_pretrained(recipe.base.model)
    return additions_to_gradients(config, recipe.max_length, recipe.max_length * recipe.global_batch_size)


def assert_equal_but_for_rounding(
    found: torch.Tensor,
    expected: torch.Tensor,
    roundings: int,
    dtype: torch.dtype = torch.float32,
    of: object = "values",
) -> None:
    """`roundings`, in a row and to `dtype`, lead to each value; `of` says in the message what is compared."""
    assert found.shape == expected.shape, of
    apart, allowed = distance(found, expected), rounding(roundings, dtype)
    assert apart <= allowed, f"{of}: {apart:.2g} of their norm apart, {allowed:.2g} allowed for {roundings} roundings"


def assert_curve_equal_but_for_rounding(
    found: list[float], expected: list[float], roundings: int, of: object = "curve"
) -> None:
    """A number of each step of training, losses or norms of gradients; `roundings` lead to a step's gradient.

    A step starts from weights that lie apart by the roundings of all steps before it: they add up.
    """
    for step, (value, wanted) in enumerate(zip(found, expected, strict=True), 1):
        apart, allowed = abs(value - wanted), step * rounding(roundings) * abs(wanted)
        assert apart <= allowed, f"{of}, step {step}: {value} is not {wanted}, {allowed:.2g} allowed"


def assert_trained_equal_but_for_rounding(
    found: torch.Tensor, expected: torch.Tensor, roundings: int, of: object = "weights"
) -> None:
    """Weights that AdamW has trained; `roundings` lead to a step's gradient.

    AdamW divides a gradient by its own size. Where that is no larger than its rounding r, nothing of the step is sure.
    So it is for a part r of all weights, and with squares added up, the norm of the change is sure to sqrt(r).
    """
    apart, allowed = distance(found, expected), math.sqrt(rounding(roundings))
    assert apart <= allowed, f"{of}: {apart:.2g} of their norm apart, {allowed:.2g} allowed"
