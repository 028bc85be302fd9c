"""A decoder layer that is trained itself: its gradients in float64 against autograd through plain transformers."""

import copy

import pytest
import torch
from reference_layers import (
    HIDDEN,
    INTERMEDIATE,
    KEYS_AND_VALUES,
    LAYERS,
    assert_close,
    assert_equal,
    logits,
    packed,
    padded,
    plain,
    run,
    values_saved,
    written_out_copy,
)

from fitune.model.elementwise import wide_dtype

KINDS = [
    {},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"head_dim": 24},
    {"kind": "mistral"},
    {"kind": "qwen2"},
    {"kind": "qwen3", "head_dim": 16},
    {"kind": "qwen3", "head_dim": 24, "attention_bias": True},
]


def trained(dtype=torch.float64, **options):
    """All but the embedding: tests give hidden states."""
    model = plain(dtype, **options)
    model.model.embed_tokens.requires_grad_(False)
    return model


@pytest.mark.parametrize("batch", [packed, padded])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_gradients_are_those_of_autograd(options, batch, exact):
    """Of every weight, bias and norm."""
    reference, (ours, theirs) = trained(**options), batch()
    expected = run(copy.deepcopy(reference), theirs)
    assert len(expected) > 9 * LAYERS
    for kept in (0, 1, LAYERS):
        assert_close(run(written_out_copy(reference, kept), ours), expected)


@pytest.mark.parametrize("options", [{}, {"attention_bias": True, "mlp_bias": True}], ids=str)
def test_tiles_of_the_mlp_and_passes_add_up(options, exact, small_tiles):
    reference = trained(**options)
    for kept in (0, LAYERS):
        ours, theirs = written_out_copy(reference, kept), copy.deepcopy(reference)
        for seed, batch in enumerate((packed, padded)):
            assert_close(run(ours, batch()[0], seed=seed), run(theirs, batch()[1], seed=seed))


def test_tiles_add_up_in_float32(small_tiles):
    """Computed in bf16, of 21 tokens in three tiles: nearer to the exact sum than bf16's own steps."""
    reference = trained(torch.bfloat16)
    found, exact = run(written_out_copy(reference), packed()[0]), run(written_out_copy(reference.float()), packed()[0])
    assert wide_dtype(torch.bfloat16) == torch.float32
    for name, gradient in found.items():
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - exact[name]).norm() < 2**-5 * exact[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_recomputed_and_offloaded_are_equal_to_the_last_bit(dtype):
    reference, batch = trained(dtype), packed()[0]
    expected = run(written_out_copy(reference), batch)
    for kept, keeps_attention, offload in ((0, False, False), (1, True, False), (0, False, True), (0, True, True)):
        model = written_out_copy(reference, kept, attention=keeps_attention, offload=offload)
        assert_equal(run(model, batch), expected)


@pytest.mark.parametrize(
    ("kept", "keeps_attention", "values"),
    [(0, False, HIDDEN), (0, True, 2 * HIDDEN), (1, False, 4 * HIDDEN + 2 * KEYS_AND_VALUES + 2 * INTERMEDIATE)],
)
def test_a_layer_saves_what_its_docstring_says(kept, keeps_attention, values):
    backbone = written_out_copy(trained(torch.float32), kept, attention=keeps_attention).model
    assert values_saved(backbone, 21) == values * 21


def test_without_gradients_logits_are_the_same():
    reference = trained()
    for ours, theirs in (packed(), padded()):
        found, expected = logits(written_out_copy(reference).eval(), ours), logits(reference.eval(), theirs)
        counts = ours["counts"].unsqueeze(-1)
        assert (found - expected).mul(counts).norm() < 1e-6 * expected.norm()


def test_without_a_gradient_of_the_input_the_others_are_the_same():
    reference, batch = trained(torch.float32), packed()[0]
    expected = run(written_out_copy(reference), batch)
    del expected["x"]
    assert_equal(run(written_out_copy(reference), batch, input_gradient=False), expected)
