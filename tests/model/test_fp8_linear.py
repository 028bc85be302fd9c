"""Weights kept in fp8: training has the bits of rounding on the way, evaluations multiply what is kept."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from reference_layers import LAYERS, SUBSETS, adapted, assert_equal, id_of, packed, padded, plain, run, written_out_copy

from fitune.model import fp8
from fitune.model.fp8_linear import FP8Linear
from fitune.model.layer import use_fp8_products
from fitune.model.linears import GROUPS
from fitune.model.skeleton import decoder


def _on_the_way(model, kept: int = LAYERS, **options):
    model = written_out_copy(model, kept, **options)
    use_fp8_products(decoder(model))
    return model


def _kept(model, kept: int = LAYERS, **options):
    return _with_bases(_on_the_way(model, kept, **options), _rounded)


def _rounded(linear: torch.nn.Linear) -> FP8Linear:
    options = {"bias": linear.bias is not None, "dtype": linear.weight.dtype}
    found = FP8Linear(linear.in_features, linear.out_features, **options)
    values, found.scales = fp8.round_weight(linear.weight.detach())
    found.weight.data = values
    found.bias = linear.bias
    return found


def _dequantised(linear: torch.nn.Linear) -> torch.nn.Linear:
    values, scales = fp8.round_weight(linear.weight.detach())
    linear.weight.data = (values.float() * scales.unsqueeze(1)).to(linear.weight.dtype)
    return linear


def _with_bases(model, change):
    """`model` with each linear of its layers as `change` has it, under its adapter."""
    for layer in decoder(model).model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if isinstance(module, LoraLayer):
                    module.base_layer = change(module.base_layer)
                elif isinstance(module, torch.nn.Linear):
                    setattr(parent, name, change(module))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [packed, padded])
def test_training_computes_the_bits_of_rounding_on_the_way(batch, dtype, small_tiles):
    model, (inputs, _) = adapted(plain(dtype, attention_bias=True), dropout=0.3), batch()
    keys = torch.arange(inputs["counts"].numel()).int()
    expected = run(_on_the_way(model), inputs, dropout_keys=keys)
    for kept, offload in ((LAYERS, False), (1, False), (0, False), (1, True)):
        assert_equal(run(_kept(model, kept, offload=offload), inputs, dropout_keys=keys), expected)


@pytest.mark.parametrize("targets", SUBSETS, ids=id_of)
def test_so_it_does_whatever_has_an_adapter(targets):
    model, (inputs, _) = adapted(plain(torch.float32), targets), packed()
    assert_equal(run(_kept(model), inputs), run(_on_the_way(model), inputs))


def test_scales_are_there_once():
    layer = decoder(_kept(adapted(plain(torch.float32)))).model.layers[0]
    for members in GROUPS.values():
        bases = [layer.bases()[index] for index in members]
        expected = torch.cat([base.scales for base in bases])
        stacked = fp8.row_scales(bases)
        assert torch.equal(stacked, expected) and torch.equal(torch.cat([base.scales for base in bases]), expected)
        storages = {scales.untyped_storage().data_ptr() for scales in (stacked, *(base.scales for base in bases))}
        assert len(storages) == 1


def test_one_linear_of_an_input_is_multiplied_where_it_lies():
    base = _rounded(torch.nn.Linear(64, 32, bias=False))
    assert fp8._stacked([base]) is base.weight
    assert torch.equal(fp8._stacked([base], transposed=True).view(torch.uint8), base.weight.view(torch.uint8).t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evaluations_multiply_what_is_kept_unrounded(dtype):
    """Products with s V, its factors multiplied in float32; activations are not rounded."""
    model, (inputs, _) = adapted(plain(dtype)), packed()
    expected = run(_with_bases(written_out_copy(model), _dequantised).eval(), inputs)
    assert_equal(run(_kept(model).eval(), inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_so_does_generation(dtype):
    """With a key-value cache layers compute as PEFT has them."""
    model, ids = adapted(plain(dtype, mlp_bias=True)), torch.arange(5, 17).unsqueeze(0)
    logits = [
        found.eval()(input_ids=ids, use_cache=True).logits
        for found in (_kept(model), _with_bases(written_out_copy(model), _dequantised))
    ]
    assert torch.equal(*logits)
