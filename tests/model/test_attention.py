"""Packed attention against sdpa with a mask: the same logits, each example by itself, no mask made."""

import pytest
import torch
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
    model.set_attn_implementation(attention.PACKED_ATTENTION)
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
    ("lengths", "capability", "taken"),
    [
        ([2100, 2100], (9, 0), True),
        ([3000], (10, 0), True),
        ([2900, 3000, 3072], (9, 0), True),
        ([2100, 1800], (9, 0), False),  # many pads
        ([1024] * 4, (9, 0), False),  # short
        ([3000], (8, 9), False),
        ([3000], (12, 0), False),  # a desktop's Blackwell
    ],
    ids=str,
)
def test_cudnn_computes_examples_of_one_length_where_it_is_faster(lengths, capability, taken, monkeypatch):
    monkeypatch.setattr(attention, "_capability", lambda device: capability)
    query, bounds = torch.empty(sum(lengths), 4, 8), torch.tensor([0, *lengths]).cumsum(0)
    assert attention.takes_cudnn(query, bounds, max(lengths)) == taken


@pytest.mark.parametrize("lengths", [[1, 1], [255, 255], [256, 256], [300, 17, 1, 299]], ids=str)
def test_pads_of_rows_change_nothing(lengths):
    """Forward and backward as cuDNN's kernel is called, by sdpa in float64: as of one example after the other."""
    heads, size, longest = 4, 8, max(lengths)
    tokens = [torch.randn(sum(lengths), heads, size, dtype=torch.float64) for _ in range(4)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    *inputs, gradient = tokens
    expected, _ = attention.forward(*inputs, bounds, longest, 0.3)
    expected_gradients = attention.backward(gradient, *inputs, expected, (), bounds, longest, 0.3)

    rows = attention._rows_of(inputs[0], bounds, longest)
    assert attention._rows_of(inputs[0], bounds, longest) is rows, "made once for all layers of a pass"
    padded = [rows.of(x).requires_grad_() for x in inputs]
    assert {x.shape for x in padded} == {(len(lengths), heads, -(-longest // 256) * 256, size)}
    output = torch.nn.functional.scaled_dot_product_attention(*padded, is_causal=True, scale=0.3)
    gradients = torch.autograd.grad(output, padded, rows.of_gradient(gradient))
    for ours, exact in zip([output, *gradients], [expected, *expected_gradients], strict=True):
        torch.testing.assert_close(rows.examples(ours), exact, rtol=1e-12, atol=1e-12)
