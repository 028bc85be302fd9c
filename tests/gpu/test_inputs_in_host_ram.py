"""What recomputed layers keep, in host RAM, on a GPU: the same values, however far Python and the link run ahead."""

import pytest
import torch
from reference_layers import adapted, plain, written_out_copy
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

from fitune.model import attention
from fitune.model.host_inputs import HostInputs
from fitune.model.skeleton import decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
LAYERS, HIDDEN, TOKENS = 8, 1024, 4096
LATE_CYCLES = 200_000_000
"0.1 s of an H200."
NOISE = 2**-7 * LAYERS**0.5
"""Of gradients. Attention's kernels add up those of queries in any order. That rounds some values to bf16 the other
way, at worst all of them: then they are as far apart as from float32's, of which they were 0.016 on the CPU."""


def test_what_left_comes_back_however_late_the_gpu_is():
    """Rows of changing length. Each tensor's memory is written again as soon as it is free."""
    host_inputs = HostInputs()
    for tokens in (TOKENS, 300, TOKENS, 2 * TOKENS):
        torch.cuda._sleep(LATE_CYCLES)
        left = []
        for layer in range(LAYERS):
            tensors = [torch.full((tokens, HIDDEN), float(layer + part), device="cuda") for part in (0, 0.5)]
            left.append(host_inputs.offload(tensors))
            host_inputs.release()
            del tensors
            torch.full((tokens, HIDDEN), -1.0, device="cuda")
        wrong = []
        for layer in reversed(range(LAYERS)):
            found = host_inputs.fetch(left[layer])
            wrong += [(part != layer + number / 2).sum() for number, part in enumerate(found)]
            del found
            torch.full((tokens, HIDDEN), -1.0, device="cuda")
        assert torch.stack(wrong).sum() == 0


@pytest.fixture(params=[False, True], ids=["inputs", "and attention"])
def models(request):
    """(what is kept in host RAM, on the GPU), in bf16. With larger adapters roundings would change all."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS}
    reference = adapted(plain(torch.bfloat16, **sizes, num_attention_heads=8)).cuda()
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, reference.parameters()):
            parameter.mul_(0.3)
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
    """Attention by its formula, which adds up in one order. No bounds are read: Python would wait for the GPU."""

    def by_formula(query, key, value, bounds, longest, scaling):
        rows = (x.transpose(0, 1) for x in (query, key, value))
        with sdpa_kernel(SDPBackend.MATH):
            attended = F.scaled_dot_product_attention(*rows, is_causal=True, scale=scaling, enable_gqa=True)
        return attended.transpose(0, 1)

    def as_kernels_give_them(*args, backward=attention.backward):
        gradients, places = backward(*args)
        return [x.contiguous() for x in gradients], places

    monkeypatch.setattr(attention, "kernel_of", lambda *_: "examples")
    monkeypatch.setattr(attention, "_by_example", by_formula)
    monkeypatch.setattr(attention, "backward", as_kernels_give_them)


def _passes(models):
    """(output, gradients) of both models, of rows of changing length, each after a pause of the GPU."""
    for seed, tokens in enumerate((TOKENS, 300, TOKENS, 2 * TOKENS)):
        torch.cuda._sleep(LATE_CYCLES)
        yield [_run(model, tokens, seed) for model in models]


def test_a_pass_is_that_with_all_of_it_on_the_gpu(models, one_order):
    for (output, gradients), (expected, their_gradients) in _passes(models):
        assert torch.equal(output, expected)
        assert torch.equal(gradients, their_gradients), _apart(gradients, their_gradients)


def test_a_pass_with_attentions_kernels_is_so_but_for_the_order_of_their_sums(models):
    for (output, gradients), (expected, their_gradients) in _passes(models):
        assert torch.equal(output, expected)
        assert _apart(gradients, their_gradients) <= NOISE


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


def test_attention_that_is_kept_is_that_computed_again(models, one_order):
    _, model = models
    output, gradients = _run(model, TOKENS, 0)
    for layer in decoder(model).model.layers:
        layer.keep_attention = not layer.keep_attention
    other, other_gradients = _run(model, TOKENS, 0)
    assert torch.equal(output, other)
    assert torch.equal(gradients, other_gradients), _apart(gradients, other_gradients)
