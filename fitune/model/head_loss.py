"""The loss over the vocabulary, its gradients computed beside it: logits are multiplied once, a few tokens at a time.

A token's loss needs all of its logits, and then the logits' gradient is at hand. So each tile of tokens is multiplied
by the whole head, its loss is taken, the gradient is written over the logits and multiplied back at once. Backward
only scales what is there. To compute the logits anew in backward, as TRL's fused loss does, takes a third product with
the head, or a fourth where the head is trained.

On a GPU a tile's loss and gradient are one Triton kernel (`fitune.model.head_loss_triton`), elsewhere the formulas of
`fold`, which the kernel is tested against. N tokens, h hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from fitune.config.tiles import LOSS_TOKENS, LOSS_TOKENS_OF_A_TRAINED_HEAD
from fitune.model import products
from fitune.model.elementwise import wide


@dataclass(frozen=True)
class TokenSums:
    """Over N tokens: float32 scalars, or float64 ones of a float64 model."""

    loss: torch.Tensor
    "Negative log-likelihood, nats."
    entropy: torch.Tensor
    right: torch.Tensor
    "How many have the highest logit of all; of equal ones the first counts."


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> TokenSums:
    """Of hidden states [N, h], head [V, h], bias [V] and the tokens to predict [N]. Only `loss` has a gradient."""
    return TokenSums(*_HeadLoss.apply(hidden, weight, bias, targets, torch.is_grad_enabled()))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, trains):
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = _Gradients((hidden, weight, bias), ctx.needs_input_grad, trains)
            sums, tiles = wide(hidden.new_zeros(3)), _tiles(len(hidden), gradients.weight is not None)
            for tile, logits in zip(tiles, _room_for_logits(tiles, hidden, weight), strict=True):
                torch.mm(hidden[tile], weight.t(), out=logits)
                if bias is not None:
                    logits += bias
                sums += fold(logits, targets[tile], gradients.are_wanted).sum(0)
                gradients.add(tile, logits, hidden[tile], weight)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        loss, *others = (part.clone() for part in sums)  # FSDP warns of outputs that are views
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, *_):
        scaled = [
            gradient if gradient is None else torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


class _Gradients:
    """Of a loss of scale 1, summed up in float32."""

    def __init__(self, inputs: tuple[torch.Tensor | None, ...], needed: tuple[bool, ...], trains: bool):
        self.are_wanted = trains and any(needed)
        self.hidden, self.weight, self.bias = (
            torch.zeros_like(tensor, dtype=wide(tensor[:0]).dtype) if trains and is_needed else None
            for tensor, is_needed in zip(inputs, needed, strict=False)
        )

    def add(self, tile: slice, logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        """Those of a tile whose `logits` are their gradient by now."""
        if self.hidden is not None:
            products.add(self.hidden[tile], logits, weight)
        if self.weight is not None:
            products.add(self.weight, logits.t(), hidden)
        if self.bias is not None:
            self.bias += logits.sum(0, dtype=self.bias.dtype)


def _tiles(tokens: int, trained_head: bool) -> list[slice]:
    size = LOSS_TOKENS_OF_A_TRAINED_HEAD if trained_head else LOSS_TOKENS
    return [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]


def _room_for_logits(tiles: list[slice], hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """[tile's tokens, V] for each, in the same memory."""
    room = hidden.new_empty(max((tile.stop - tile.start for tile in tiles), default=0), len(weight))
    yield from (room[: tile.stop - tile.start] for tile in tiles)


def fold(logits: torch.Tensor, targets: torch.Tensor, gradient: bool) -> torch.Tensor:
    """logits [n, V], targets [n] -> [n, 3] in float32: loss, entropy, and 1 where the target is the likeliest token.

    With `gradient` the logits become that of the sum of losses: probabilities, less 1 at the target.
    """
    if logits.is_cuda:
        from fitune.model import head_loss_triton

        return head_loss_triton.fold(logits, targets, gradient)
    log_probs, place = wide(logits).log_softmax(-1), targets[:, None]
    probs, right = log_probs.exp(), logits.argmax(-1) == targets
    loss, entropy = -log_probs.gather(1, place)[:, 0], -(probs * log_probs).sum(-1)
    if gradient:
        logits.copy_(probs.scatter_add(1, place, torch.full_like(loss, -1.0)[:, None]))
    return torch.stack([loss, entropy, right.to(loss)], dim=1)
