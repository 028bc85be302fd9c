"""What recomputed layers keep, in host RAM, on a GPU: the same bits, however far Python and the link run ahead."""

import pytest
import torch
from reference_layers import adapted, assert_equal, plain, written_out_copy
from torch.nn.utils import parameters_to_vector

from fitune.model.skeleton import decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
LAYERS, HIDDEN, TOKENS = 8, 1024, 8192
LATE_CYCLES = 200_000_000
"0.1 s of an H200."


@pytest.fixture(params=[False, True], ids=["inputs", "and attention"])
def models(request):
    """(what is kept in host RAM, on the GPU), in bf16."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS}
    reference = adapted(plain(torch.bfloat16, **sizes, num_attention_heads=8)).cuda()
    return [written_out_copy(reference, 0, attention=request.param, offload=offload) for offload in (True, False)]


def _run(model, tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """The last layer's output and all gradients, of one row."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x, dy = torch.randn(2, 1, tokens, HIDDEN, generator=generator, device="cuda").bfloat16()
    model.zero_grad()
    y = decoder(model).model(inputs_embeds=x.requires_grad_(), use_cache=False).last_hidden_state
    y.backward(dy)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return {"output": y.detach(), "input": x.grad, "parameters": parameters_to_vector(gradients)}


def test_passes_of_changing_length_are_equal_to_the_last_bit(models):
    """The GPU is kept behind Python: a copy that does not wait would read or write too early."""
    found = []
    for model in models:
        for seed, tokens in enumerate((TOKENS, 300, TOKENS, 2 * TOKENS)):
            torch.cuda._sleep(LATE_CYCLES)
            found.append(_run(model, tokens, seed))
    passes = len(found) // 2
    for ours, theirs in zip(found[:passes], found[passes:], strict=True):
        assert_equal(ours, theirs)


def test_the_gpu_has_no_more_than_the_layer_that_computes_and_the_next_have_kept(models):
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
    assert (peaks[1] - peaks[0]) / kept_by_a_layer > LAYERS - 2.5


def test_kept_attention_changes_no_bit(models):
    """Against what computes it again."""
    _, model = models
    found = _run(model, TOKENS, 0)
    for layer in decoder(model).model.layers:
        layer.keep_attention = not layer.keep_attention
    assert_equal(found, _run(model, TOKENS, 0))
