"""Packed attention against sdpa with a mask: the same logits, each example by itself, no mask made."""

import pytest
import torch
from gpu_kernels import kernels_on_the_cpu
from rounding import additions_to_logits, assert_equal_but_for_rounding
from transformers import LlamaForCausalLM, masking_utils

from fitune.model import attention

LENGTHS = [5, 1, 9, 4]


def _packed_row() -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    ids = torch.randint(0, 500, positions.shape, generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(LENGTHS)}
    return {"input_ids": ids, "position_ids": positions, **packing, "max_length_k": max(LENGTHS)}


@pytest.fixture
def model(tiny_base):
    return LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


def test_each_example_of_a_packed_row_attends_to_itself(model):
    masked = model(**_packed_row(), use_cache=False).logits
    model.set_attn_implementation(attention.PACKED_ATTENTION)

    packed = model(**_packed_row(), use_cache=False).logits
    assert_equal_but_for_rounding(packed, masked, additions_to_logits(model.config, sum(LENGTHS)))


def test_no_mask_is_made(model, monkeypatch):
    model.set_attn_implementation(attention.PACKED_ATTENTION)
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda *args, **kwargs: pytest.fail("a mask was made"))
    seen = []
    original = attention.packed_attention
    monkeypatch.setitem(
        attention.AttentionInterface._global_mapping,
        attention.PACKED_ATTENTION,
        lambda module, query, key, value, mask, **rest: (
            seen.append(mask) or original(module, query, key, value, mask, **rest)
        ),
    )
    model(**_packed_row(), use_cache=False)
    assert seen == [None] * model.config.num_hidden_layers


def test_a_packed_row_without_the_length_of_its_longest_example_is_refused(model):
    """The GPU's kernel needs it; the CPU could do without."""
    model.set_attn_implementation(attention.PACKED_ATTENTION)
    row = {key: value for key, value in _packed_row().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match="comes with the length of its longest example"):
        model(**row, use_cache=False)


def test_bounds_of_another_dtype_are_refused(model):
    """The GPU's kernel takes int32 alone."""
    model.set_attn_implementation(attention.PACKED_ATTENTION)
    row = _packed_row()
    with pytest.raises(ValueError, match=r"are int32 on cpu, not torch\.int64"):
        model(**row | {"cu_seq_lens_q": row["cu_seq_lens_q"].long()}, use_cache=False)


def test_generation_goes_to_sdpa(model):
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    model.set_attn_implementation(attention.PACKED_ATTENTION)

    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_padding_on_the_left_changes_no_answer(model):
    """Prompts of several lengths in one batch, each answered as alone."""
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11]]
    alone = [model.generate(torch.tensor([p]), max_new_tokens=5, do_sample=False)[0, len(p) :] for p in prompts]
    model.set_attn_implementation(attention.PADDED_ATTENTION)
    ids = torch.tensor([[0] * (6 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (6 - len(p)) + [1] * len(p) for p in prompts])
    together = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, 6:]
    assert together.tolist() == [answer.tolist() for answer in alone]


def test_padding_in_a_packed_row_is_refused():
    states = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="a packed row has no padding"):
        attention.packed_attention(
            None, states, states, states, torch.ones(1, 4), cu_seq_lens_q=torch.tensor([0, 4]), max_length_q=4
        )


@pytest.mark.parametrize(
    ("lengths", "capability", "kernel"),
    [
        ([2100, 2100], 9.0, "cudnn"),
        ([3000], 10.0, "cudnn"),
        ([2900, 3000, 3072], 9.0, "cudnn"),
        ([2100, 1800], 9.0, "flash"),  # many pads
        ([1024] * 4, 9.0, "flash"),  # short
        ([3000], 8.9, "flash"),
        ([3000], 12.0, "flash"),  # a desktop's Blackwell
        ([3000], None, "examples"),  # no GPU
    ],
    ids=str,
)
def test_cudnn_computes_examples_of_one_length_where_it_is_faster(lengths, capability, kernel, monkeypatch):
    monkeypatch.setattr(attention, "compute_capability", lambda device: capability)
    query, bounds = torch.empty(sum(lengths), 4, 8), torch.tensor([0, *lengths]).cumsum(0)
    assert attention.kernel_of(query, bounds, max(lengths)) == kernel


GPU_LENGTHS = {"cudnn": [[256, 256], [255, 250], [300, 290, 1]], "flash": [[300, 17, 1, 299]]}


@pytest.mark.parametrize(
    ("kernel", "lengths"), [(kernel, lengths) for kernel, rows in GPU_LENGTHS.items() for lengths in rows], ids=str
)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_what_a_gpu_does_with_a_packed_row(kernel, lengths, key_heads, monkeypatch):
    """Forward and backward up to the kernels' own call, in float64: as of one example after the other."""
    longest, bounds = max(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    gradient = torch.randn(sum(lengths), 4, 8, dtype=torch.float64)
    heads = torch.randn(sum(lengths), 4 + 2 * key_heads, 8, dtype=torch.float64)
    exact, _ = attention.forward(heads, key_heads, bounds, longest, 0.3)
    exact_gradients, _ = attention.backward(gradient, exact, heads, key_heads, (), bounds, longest, 0.3)

    monkeypatch.setattr(attention, "compute_capability", lambda device: 9.0)
    monkeypatch.setattr(attention, "CUDNN_FROM", 200)
    monkeypatch.setattr(attention, "CUDNN_PADS", 3.0 if kernel == "cudnn" else 0.0)
    with kernels_on_the_cpu() as calls:
        output, statistics = attention.forward(heads, key_heads, bounds, longest, 0.3)
        gradients, places = attention.backward(gradient, output, heads, key_heads, statistics, bounds, longest, 0.3)
    if places is not None:
        gradients = [gradient[places] for gradient in gradients]
    assert len(calls) == 2 and all(kernel in call for call in calls)
    for ours, theirs in zip([output, *gradients], [exact, *exact_gradients], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (kernel == "cudnn") == hasattr(bounds, "fitune_rows"), "made once for all layers of a pass"


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_a_whole_model_calls_the_gpus_kernels_as_they_demand(model, kernel, monkeypatch):
    """As `eval` calls it, through transformers."""
    model.set_attn_implementation(attention.PACKED_ATTENTION)
    expected = model(**_packed_row(), use_cache=False).logits
    monkeypatch.setattr(attention, "compute_capability", lambda device: 9.0)
    monkeypatch.setattr(attention, "CUDNN_FROM", 1)
    monkeypatch.setattr(attention, "CUDNN_PADS", 1e9 if kernel == "cudnn" else 0.0)
    with kernels_on_the_cpu(), torch.no_grad():
        packed = model(**_packed_row(), use_cache=False).logits
    assert_equal_but_for_rounding(packed, expected, additions_to_logits(model.config, sum(LENGTHS)))
