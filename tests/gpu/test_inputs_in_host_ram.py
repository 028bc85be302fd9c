"""What recomputed layers keep, in host RAM, on a GPU: the same values, however far Python and the link run ahead."""

import pytest
import torch
from reference_layers import adapted, plain, written_out_copy
from torch.nn.utils import parameters_to_vector

from fitune.model import attention
from fitune.model.host_inputs import HostInputs
from fitune.model.skeleton import decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
LAYERS, HIDDEN, TOKENS = 8, 1024, 8192
LATE_CYCLES = 200_000_000
"0.1 s of an H200."
ROUNDED_ANEW = 2**-8 * LAYERS**0.5
"""How far apart gradients may be where one sum in the last layer was added up in another order: a rounding of bf16 that
goes the other way changes most of those after it."""


def test_what_left_comes_back_however_late_the_gpu_is():
    """Rows of changing length. Each tensor's memory is written again as soon as it is free."""
    host_inputs = HostInputs()
    for tokens in (TOKENS, 300, TOKENS, 2 * TOKENS):
        torch.cuda._sleep(LATE_CYCLES)
        left = []
        for layer in range(LAYERS):
            tensors = [torch.full((tokens, HIDDEN), float(layer + part), device="cuda") for part in (0, 0.5)]
            left.append(host_inputs.leave(tensors))
            host_inputs.let_go()
            del tensors
            torch.full((tokens, HIDDEN), -1.0, device="cuda")
        wrong = []
        for layer in reversed(range(LAYERS)):
            found = host_inputs.bring(left[layer])
            wrong += [(part != layer + number / 2).sum() for number, part in enumerate(found)]
            del found
            torch.full((tokens, HIDDEN), -1.0, device="cuda")
        assert torch.stack(wrong).sum() == 0


@pytest.fixture(params=[False, True], ids=["inputs", "and attention"])
def models(request):
    """(what is kept in host RAM, on the GPU), in bf16."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS}
    reference = adapted(plain(torch.bfloat16, **sizes, num_attention_heads=8)).cuda()
    return [written_out_copy(reference, 0, attention=request.param, offload=offload) for offload in (True, False)]


def _run(model, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last layer's output of one row, and all gradients, the input's first."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x, dy = torch.randn(2, 1, tokens, HIDDEN, generator=generator, device="cuda").bfloat16()
    model.zero_grad()
    y = decoder(model).model(inputs_embeds=x.requires_grad_(), use_cache=False).last_hidden_state
    y.backward(dy)
    return y.detach(), parameters_to_vector([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]).double()


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.fixture
def one_order(monkeypatch):
    """Attention adds up its gradients in one order: FlashAttention does if it is asked, cuDNN never."""
    monkeypatch.setattr(attention, "CUDNN_CAPABILITIES", frozenset())
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _passes(models):
    """(output, gradients) of both models, of rows of changing length, each after a pause of the GPU."""
    for seed, tokens in enumerate((TOKENS, 300, TOKENS, 2 * TOKENS)):
        torch.cuda._sleep(LATE_CYCLES)
        yield [_run(model, tokens, seed) for model in models]


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_a_pass_is_that_with_all_of_it_on_the_gpu(models, one_order):
    for (output, gradients), (expected, their_gradients) in _passes(models):
        assert torch.equal(output, expected)
        assert torch.equal(gradients, their_gradients), _apart(gradients, their_gradients)


def test_a_pass_with_cudnns_attention_is_so_but_for_the_order_of_its_sums(models):
    for (output, gradients), (expected, their_gradients) in _passes(models):
        assert torch.equal(output, expected)
        assert _apart(gradients, their_gradients) <= ROUNDED_ANEW


def test_the_gpu_has_no_more_than_the_layer_that_computes_and_the_next_have_kept(models):
    """The first layer's input is the test's own, which stays."""
    peaks = []
    for model in models:
        for seed in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _run(model, TOKENS, seed)
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
    kept_by_a_layer = TOKENS * HIDDEN * 2 * (1 + decoder(models[0]).model.layers[0].keep_attention)
    assert (peaks[1] - peaks[0]) / kept_by_a_layer > LAYERS - 1 - 2 - 0.5


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_attention_that_is_kept_is_that_computed_again(models, one_order):
    _, model = models
    output, gradients = _run(model, TOKENS, 0)
    for layer in decoder(model).model.layers:
        layer.keep_attention = not layer.keep_attention
    other, other_gradients = _run(model, TOKENS, 0)
    assert torch.equal(output, other)
    assert torch.equal(gradients, other_gradients), _apart(gradients, other_gradients)
