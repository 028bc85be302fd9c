"""The loss's kernel on a GPU against the formulas that the CPU takes."""

import math

import pytest
import torch

from fitune.model.grid import blocks_of
from fitune.model.head_loss import fold, head_loss

if torch.cuda.is_available():
    from fitune.model.head_loss_triton import BLOCK

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

VOCABULARIES = [101, 4096, 32000, 49152, 128256]
by_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES)


@by_vocabulary
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "values"])
def test_the_kernel_folds_as_the_formulas_do(gradient, tokens, vocabulary):
    """Against float64. A lane rounds its sums once for each of its columns, their joining in 12 more steps, a power of
    e is off by two units; entropy is a sum of logits, and both take the log of a sum. A gradient may be rounded to bf16
    the other way."""
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(tokens, vocabulary)).bfloat16(), torch.randint(vocabulary, (tokens,))
    on_gpu, exact = logits.cuda(), logits.double()
    found, wanted = fold(on_gpu, targets.cuda(), gradient).cpu(), fold(exact, targets, gradient)
    roundings = blocks_of(vocabulary, BLOCK) + 12 + 2
    largest = float(logits.abs().max()) + math.log(vocabulary)
    allowed = roundings * torch.finfo(torch.float32).eps * largest
    torch.testing.assert_close(found[:, :2].double(), wanted[:, :2], rtol=0, atol=allowed)
    assert torch.equal(found[:, 2].double(), wanted[:, 2])
    if gradient:
        torch.testing.assert_close(on_gpu.cpu().double(), exact, rtol=1.01 * 2**-8, atol=1e-30)
    else:
        assert torch.equal(on_gpu.cpu(), logits)


def test_first_of_equal_logits_and_nan():
    logits = torch.zeros(3, 5000, device="cuda", dtype=torch.bfloat16)
    logits[2, 4500] = float("nan")
    found = fold(logits, torch.tensor([0, 1, 0], device="cuda"), False)
    assert found[:2, 2].tolist() == [1, 0] and found[2, 0].isnan()


@by_vocabulary
@pytest.mark.parametrize("head_trained", [True, False], ids=["trained head", "frozen head"])
def test_gradients_are_those_of_the_cpu(head_trained, vocabulary):
    torch.manual_seed(0)
    tokens, size = 1100, 64
    inputs = [torch.randn(tokens, size).bfloat16(), (torch.randn(vocabulary, size) / 8).bfloat16()]
    targets, results = torch.randint(vocabulary, (tokens,)), []
    for device in ("cpu", "cuda"):
        hidden, weight = (one.clone().to(device).requires_grad_() for one in inputs)
        weight.requires_grad_(head_trained)
        sums = head_loss(hidden, weight, None, targets.to(device))
        (sums.loss / tokens).backward()
        results.append((sums.loss.cpu(), hidden.grad.cpu(), weight.grad.cpu() if head_trained else None))
    for on_cpu, on_gpu in zip(*results, strict=True):
        if on_cpu is not None:
            assert (on_gpu.double() - on_cpu.double()).norm() <= 2**-7 * on_cpu.double().norm()
