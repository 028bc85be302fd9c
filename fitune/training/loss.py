"""The loss of training: of the answer tokens alone, whose places are known before a step begins.

TRL's trainer finds them in the middle of each pass. The GPU stands still meanwhile, since Python waits for their
number. Here Python asks for it when the GPU has nothing to do anyway.
"""

from dataclasses import dataclass
from types import MethodType

import torch
from torch import nn

from fitune.data.token_file import IGNORED
from fitune.model.head_loss import head_loss

ANSWERS = "answers"
"The name under which `Answers` travel with a batch to the model."


@dataclass(frozen=True)
class Answers:
    """The tokens of a batch that are learned: each is predicted from the hidden state before it."""

    places: torch.Tensor
    "[answers], of those hidden states among the batch's rows one after the other."
    tokens: torch.Tensor
    "[answers]"

    def to(self, device: torch.device) -> "Answers":
        return Answers(self.places.to(device), self.tokens.to(device))


def find_answers(labels: torch.Tensor) -> Answers:
    """Of labels [rows, length]; IGNORED is no answer. Waits for the GPU to send them, once, and looks on the CPU.

    The GPU computes meanwhile, and kernels that looked there would each wait for their turn.
    """
    length, known = labels.shape[1], labels.cpu()
    row, column = (known[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return Answers(row * length + column, known[row, column + 1]).to(labels.device)


def add_answer_loss(causal_lm: nn.Module) -> None:
    """`causal_lm(..., answers=Answers)` returns `TokenSums`; without answers everything is as it was."""
    without = causal_lm.forward

    def forward(self, *args, answers: Answers | None = None, **kwargs):
        if answers is None:
            return without(*args, **kwargs)
        kwargs.pop("labels", None)
        hidden = self.model(*args, **kwargs).last_hidden_state
        head = self.get_output_embeddings()
        chosen = hidden.flatten(0, 1).index_select(0, answers.places)
        return head_loss(chosen, head.weight, head.bias, answers.tokens)

    causal_lm.forward = MethodType(forward, causal_lm)
