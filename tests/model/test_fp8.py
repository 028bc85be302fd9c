"""Products in fp8: the arithmetic against a plain one of its own, and what the layer makes of it."""

import math

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from fp8_reference import rounding_in_autograd, scaled
from reference_layers import (
    LAYERS,
    adapted,
    assert_close,
    assert_equal,
    id_of,
    packed,
    padded,
    plain,
    run,
    written_out_copy,
)
from rounding import distance

from fitune.errors import UsageError
from fitune.model import fp8
from fitune.model.dropout import Dropout
from fitune.model.elementwise import factors
from fitune.model.layer import use_fp8_products
from fitune.model.linears import GROUPS
from fitune.model.nf4 import STORAGE, NF4Linear
from fitune.model.skeleton import decoder

STEP = 1 / 16
"Of a number at most: what rounding to e4m3's three bits takes away or adds."
PRODUCTS = 4  # in a row through one layer


def _in_fp8(model, kept: int = LAYERS, *, offload: bool = False):
    model = written_out_copy(model, kept, offload=offload)
    use_fp8_products(decoder(model))
    return model


def _frozen(inputs: int, outputs: int) -> torch.nn.Linear:
    return torch.nn.Linear(inputs, outputs, bias=False).requires_grad_(False)


def test_rounded_rows_are_as_near_as_e4m3_allows():
    """Rows with an outlier, of the largest and smallest numbers that bf16 holds, of zeros."""
    torch.manual_seed(0)
    x = torch.randn(6, 500)
    x[1, 7] = 1e4
    x[2] *= 1e37
    x[3] *= 1e-25
    x[4] = 0
    values, scales = fp8.quantise_rows(x.bfloat16())
    exact = x.bfloat16().double()
    found = values.double() * scales.double().unsqueeze(1)
    assert found.isfinite().all()
    allowed = torch.maximum(exact.abs() * STEP, exact.abs().amax(1, keepdim=True) / 458752) * (1 + 1e-6)
    assert ((found - exact).abs() <= allowed).all()
    assert (values.float().abs().amax(1)[[0, 1, 2, 3, 5]] == 448).all()
    assert torch.equal(values.double(), scaled(x.bfloat16())[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_in_its_own_token(bad):
    torch.manual_seed(0)
    x, base = torch.randn(3, 64), _frozen(64, 32)
    x[1, 5] = bad
    forward = fp8.multiply(x, [base], torch.empty(3, 32))
    backward = fp8.multiply_backward(x, [_frozen(32, 64)])
    for found in (forward, backward):
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()


def test_a_product_is_as_near_as_two_rounded_factors_allow():
    torch.manual_seed(0)
    x, dy, base = torch.randn(50, 256), torch.randn(50, 128), _frozen(256, 128)
    base.weight.data *= torch.logspace(-4, 1, 128).unsqueeze(1)  # rows of very different sizes
    products = [
        (fp8.multiply(x, [base], torch.empty(50, 128)), x @ base.weight.t()),
        (fp8.multiply_backward(dy, [base]), dy @ base.weight),
    ]
    for found, exact in products:
        assert STEP / 10 < distance(found, exact) < 2 * STEP


@pytest.mark.parametrize("batch", [packed, padded])
@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], ["k_proj", "up_proj"], ["down_proj"]], ids=id_of
)
def test_outputs_and_gradients_are_those_of_the_same_rounding_in_autograd(targets, batch, exact, small_tiles):
    ours, theirs = batch()
    model = adapted(plain(), targets)
    expected = run(rounding_in_autograd(model), theirs)
    for kept in (0, 1, LAYERS):
        assert_close(run(_in_fp8(model, kept), ours), expected)


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases_are_added_unrounded(biases, exact):
    ours, theirs = packed()
    model = adapted(plain(**biases))
    assert_close(run(_in_fp8(model), ours), run(rounding_in_autograd(model), theirs))


def test_dropout_is_that_of_bf16(exact):
    """The adapters read what they always read, neither rounded nor masked otherwise."""
    ours, theirs = packed()
    keys = torch.randint(-(2**31), 2**31, (ours["size"][1],), generator=torch.Generator().manual_seed(5)).int()
    model = adapted(plain(), dropout=0.3)
    found = run(_in_fp8(model), ours, dropout_keys=keys)
    reference = rounding_in_autograd(model)
    for number, layer in enumerate(decoder(reference).model.layers):
        for place, members in GROUPS.items():
            linears = layer.self_attn if place < 2 else layer.mlp
            names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            for linear in (getattr(linears, names[index]) for index in members):
                mask = factors(Dropout(0.3, keys, len(GROUPS) * number + place + 1), linear.in_features)
                linear.lora_dropout["default"] = _Times(mask)
    assert_close(found, run(reference, theirs))


class _Times(torch.nn.Module):
    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def test_the_whole_model_is_as_near_as_its_products_allow():
    ours, _ = packed()
    model = adapted(plain(torch.float32))
    exact, found = run(written_out_copy(model), ours), run(_in_fp8(model), ours)
    in_a_row = 2 * PRODUCTS * LAYERS  # to a gradient: forward and back
    for name, value in exact.items():
        assert STEP / 10 < distance(found[name], value) < 2 * STEP * math.sqrt(in_a_row), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_recomputed_and_offloaded_are_equal_to_the_last_bit(dtype, small_tiles):
    model, (batch, _) = adapted(plain(dtype), dropout=0.3), packed()
    keys = torch.arange(batch["size"][1]).int()
    expected = run(_in_fp8(model), batch, dropout_keys=keys)
    for kept, offload in ((0, False), (1, False), (0, True), (1, True)):
        assert_equal(run(_in_fp8(model, kept, offload=offload), batch, dropout_keys=keys), expected)


def test_without_a_gradient_of_the_input_the_others_are_the_same():
    model, (batch, _) = adapted(plain(torch.float32)), packed()
    expected = run(_in_fp8(model), batch)
    del expected["x"]
    assert_equal(run(_in_fp8(model), batch, input_gradient=False), expected)


def test_evaluation_does_not_round():
    model, (batch, _) = adapted(plain(torch.float32)), packed()
    assert_equal(run(_in_fp8(model).eval(), batch), run(written_out_copy(model).eval(), batch))


@pytest.mark.parametrize("double", [True, False], ids=["scales packed too", "plain scales"])
def test_nf4_is_rounded_as_the_weights_that_it_stands_for(double):
    torch.manual_seed(0)
    bytes_, state = quantize_4bit(torch.randn(48, 192) * 0.02, compress_statistics=double, quant_type="nf4")
    packed_, unpacked = NF4Linear(192, 48), _frozen(192, 48)
    packed_.weight.data, packed_.quant_state = bytes_.view(-1).view(STORAGE).unsqueeze(1), state
    unpacked.weight.data = dequantize_4bit(bytes_, state)
    x, dy = torch.randn(5, 192), torch.randn(5, 48)
    assert torch.equal(fp8.row_scales([packed_]), fp8.row_scales([unpacked]))
    forward = [fp8.multiply(x, [base], torch.empty(5, 48)) for base in (packed_, unpacked)]
    backward = [fp8.multiply_backward(dy, [base]) for base in (packed_, unpacked)]
    assert torch.equal(*forward)
    assert torch.equal(*backward)


def test_sizes_that_cannot_be_multiplied_are_refused():
    model = written_out_copy(adapted(plain(torch.float32)))
    decoder(model).model.layers[1].mlp.up_proj.base_layer = torch.nn.Linear(64, 120)
    with pytest.raises(UsageError, match=r"multiples of 16, here is one of 120 x 64; use --set profile.compute=bf16"):
        use_fp8_products(decoder(model))
