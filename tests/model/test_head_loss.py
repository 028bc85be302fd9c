"""The loss over the vocabulary against plain cross entropy: values, gradients, and how often it multiplies."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fitune.config.tiles import LOSS_TOKENS, LOSS_TOKENS_OF_A_TRAINED_HEAD
from fitune.model import head_loss as module
from fitune.model.head_loss import head_loss

HIDDEN, VOCABULARY = 16, 101
WHOLE_TILES_AND_A_PART = 2 * LOSS_TOKENS + 5


def _inputs(tokens: int, dtype=torch.float64, *, head_trained=True, bias=True) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=head_trained)
    offset = torch.randn(VOCABULARY, dtype=dtype, requires_grad=head_trained) if bias else None
    return [hidden, weight, offset]


def _targets(tokens: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (tokens,))


def _plain(hidden, weight, bias, targets) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = F.linear(hidden, weight, bias)
    log_probs = logits.log_softmax(-1)
    return (
        F.cross_entropy(logits, targets, reduction="sum"), -(log_probs.exp() * log_probs).sum(),
        (logits.argmax(-1) == targets).sum(),
    )  # fmt: skip


def _gradients(loss: torch.Tensor, inputs: list[torch.Tensor | None]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [one for one in inputs if one is not None and one.requires_grad]))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("head_trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("tokens", [1, WHOLE_TILES_AND_A_PART, LOSS_TOKENS_OF_A_TRAINED_HEAD + 1])
def test_values_and_gradients_are_those_of_cross_entropy(tokens, head_trained, bias):
    inputs, targets = _inputs(tokens, head_trained=head_trained, bias=bias), _targets(tokens)
    sums, exact = head_loss(*inputs, targets), _plain(*inputs, targets)
    for found, wanted in zip((sums.loss, sums.entropy, sums.right), exact, strict=True):
        torch.testing.assert_close(found, wanted.to(found), rtol=1e-12, atol=1e-12)
    scale = 0.37  # a pass's loss is divided by the step's tokens
    for found, wanted in zip(_gradients(sums.loss * scale, inputs), _gradients(exact[0] * scale, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_bf16_rounds_logits_and_their_gradient_and_nothing_else():
    """bf16's 8 bits: 2**-9 of a logit and of a logit's gradient; sums over tokens and vocabulary are in float32."""
    tokens = 300
    inputs, targets = _inputs(tokens, torch.bfloat16, bias=False), _targets(tokens)
    exact = [one.detach().double().requires_grad_() for one in inputs[:2]]
    found = _gradients(head_loss(*inputs, targets).loss, inputs)
    wanted = _gradients(_plain(*exact, None, targets)[0], exact)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 4 * 2**-8 * other.norm()


def test_only_the_loss_has_a_gradient():
    sums = head_loss(*_inputs(3), _targets(3))
    assert sums.loss.requires_grad and not sums.entropy.requires_grad and not sums.right.requires_grad
    assert not any(one._is_view() for one in (sums.loss, sums.entropy, sums.right)), "FSDP would warn of it"


def test_of_equal_logits_the_first_counts_as_the_likeliest():
    hidden, weight = torch.ones(2, 1), torch.tensor([[1.0], [2.0], [2.0]])
    assert head_loss(hidden, weight, None, torch.tensor([1, 2])).right == 1


def test_without_an_answer_the_loss_is_zero_and_so_are_its_gradients():
    inputs = _inputs(0)
    loss = head_loss(*inputs, _targets(0)).loss
    assert loss == 0 and all(not gradient.any() for gradient in _gradients(loss, inputs))


def test_a_logit_that_is_no_number_makes_the_loss_none():
    inputs = _inputs(5)
    inputs[0].data[2, 0] = float("nan")
    assert head_loss(*inputs, _targets(5)).loss.isnan()


class _Products(TorchDispatchMode):
    """Counts products with as many multiplications as all logits take."""

    def __init__(self, multiplications: int):
        super().__init__()
        self.one, self.done = multiplications, 0.0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [one for one in args if isinstance(one, torch.Tensor) and one.ndim == 2][-2:]
            self.done += a.numel() * b.shape[1] / self.one
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("head_trained, training, evaluating", [(False, 2, 1), (True, 3, 1)])
def test_logits_are_multiplied_once(head_trained, training, evaluating):
    inputs, targets = _inputs(70, head_trained=head_trained, bias=False), _targets(70)
    with _Products(70 * HIDDEN * VOCABULARY) as products:
        head_loss(*inputs, targets).loss.backward()
    assert products.done == training
    with _Products(70 * HIDDEN * VOCABULARY) as products, torch.no_grad():
        head_loss(*inputs, targets)
    assert products.done == evaluating


def test_one_tile_of_logits_is_alive_at_a_time(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "fold", lambda logits, *rest: seen.append(logits) or torch.zeros(len(logits), 3))
    head_loss(*_inputs(WHOLE_TILES_AND_A_PART, torch.float32, head_trained=False), _targets(WHOLE_TILES_AND_A_PART))
    assert [len(logits) for logits in seen] == [LOSS_TOKENS, LOSS_TOKENS, 5]
    assert len({logits.data_ptr() for logits in seen}) == 1


def test_autocast_changes_nothing():
    inputs, targets = _inputs(7, torch.float32), _targets(7)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head_loss(*inputs, targets).loss
    assert inside == head_loss(*inputs, targets).loss
