"""fp8 on a GPU: kernels that round and products against the arithmetic on the CPU, and a whole model."""

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from reference_layers import LAYERS, adapted, packed, padded, plain, run, written_out_copy

from fitune.model import fp8, fp8_rounding, trained_fp8
from fitune.model.e4m3 import E4M3, LARGEST
from fitune.model.fp8_linear import FP8Linear
from fitune.model.layer import use_fp8_products
from fitune.model.nf4 import STORAGE, NF4Linear
from fitune.model.skeleton import decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no GPU here that has fp8"
    ),
]

SHAPES = [(576, 1536), (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_tokens = pytest.mark.parametrize("tokens", [1, 5, 1000])


def _random(*shape: int, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * size).bfloat16()


def _nf4(outputs: int, inputs: int) -> NF4Linear:
    base = NF4Linear(inputs, outputs)
    bytes_, base.quant_state = quantize_4bit(
        _random(outputs, inputs, size=0.02).cuda(), compress_statistics=True, quant_type="nf4"
    )
    base.weight.data = bytes_.view(-1).view(STORAGE).unsqueeze(1)
    return base


def _linear(outputs: int, inputs: int) -> torch.nn.Linear:
    base = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    base.weight.data = _random(outputs, inputs, size=0.02)
    return base.cuda()


def _rounded(linear: torch.nn.Linear) -> FP8Linear:
    base = FP8Linear(linear.in_features, linear.out_features, dtype=torch.bfloat16)
    base.weight.data, base.scales = fp8.round_weight(linear.weight.detach())
    return base


def _kept(outputs: int, inputs: int) -> FP8Linear:
    return _rounded(_linear(outputs, inputs))


@by_tokens
@pytest.mark.parametrize("channels", [64, 576, 960, 4096, 6144, 28672, 57344])
@pytest.mark.parametrize("with_factors", [False, True], ids=["plain", "factors"])
def test_rows_are_rounded_as_on_the_cpu_to_the_last_bit(with_factors, channels, tokens):
    row = _random(tokens, channels + 16)[:, :channels]  # a part of a wider row
    row[0, 3] = 1e4
    row[tokens // 2] = 0
    factors = torch.rand(channels) if with_factors else None
    found = fp8.quantise_rows(row.cuda(), factors.cuda() if with_factors else None)
    expected = fp8.quantise_rows(row, factors)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))


@by_tokens
@pytest.mark.parametrize("channels", [16, 576, 960, 4096, 28672])
def test_columns_are_rounded_as_on_the_cpu_to_the_last_bit(channels, tokens):
    """And filled up with zeros to a multiple of 16 tokens."""
    x = _random(tokens, channels + 16)[:, :channels]
    x[tokens // 2, 3] = 1e4
    x[:, 5] = 0
    factors = torch.rand(tokens)
    found, expected = fp8_rounding.quantise_columns(x.cuda(), factors.cuda()), fp8_rounding.quantise_columns(x, factors)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))
    _, scales = fp8_rounding.quantise_rows(x)
    found, expected = fp8_rounding.round_columns(x.cuda(), scales.cuda()), fp8_rounding.round_columns(x, scales)
    assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("rows", [[576], [4096, 1024, 1024], [14336, 14336]], ids=str)
@by_tokens
def test_products_of_trained_weights_are_those_of_the_rounded_numbers(tokens, rows):
    weights = [_random(outputs, 4096, size=0.02).cuda() for outputs in rows]
    x, dy = _random(tokens, 4096).cuda(), _random(tokens, sum(rows)).cuda()
    y = torch.empty_like(dy)
    a, s = trained_fp8.multiply(x, weights, y)
    stacked = torch.cat(weights)
    (inputs, of_tokens), (rounded, of_rows) = (
        (part.double() for part in fp8_rounding.quantise_rows(of)) for of in (x, stacked)
    )
    assert torch.equal(a.double(), of_tokens) and torch.equal(s.double(), of_rows)
    _assert_close(y, inputs @ rounded.t() * of_tokens.unsqueeze(1) * of_rows)
    values, scales = (part.double() for part in fp8_rounding.quantise_rows(dy, s))
    _assert_close(trained_fp8.input_gradient(dy, weights, s), values @ rounded * scales.unsqueeze(1))
    columns, scales = (part.double() for part in fp8_rounding.quantise_columns(dy, a))
    _assert_close(trained_fp8.weight_gradient(dy, x, a), columns[:, :tokens] @ inputs * scales.unsqueeze(1))


def test_a_weights_gradient_adds_up_many_tokens_of_one_sign():
    x, dy = (_random(32768, channels).abs().cuda() for channels in (1024, 512))
    inputs, a = fp8_rounding.quantise_rows(x)
    columns, scales = (part.double() for part in fp8_rounding.quantise_columns(dy, a))
    _assert_close(trained_fp8.weight_gradient(dy, x, a), columns @ inputs.double() * scales.unsqueeze(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_its_own_token(bad):
    x = _random(3, 4096).cuda()
    x[1, 5] = bad
    for base in (_nf4(4096, 4096), _linear(4096, 4096)):
        for found in (fp8.multiply(x, [base], torch.empty_like(x)), fp8.multiply_backward(x, [base])):
            assert found[1].isnan().all()
            assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("make", [_nf4, _linear, _kept])
@by_shape
def test_weights_are_rounded_as_on_the_cpu_in_both_directions(shape, make):
    """Where a number lies just between two of e4m3's, the last bit of its scale decides."""
    bases = [make(*shape), make(*shape)]
    by_output, by_input = fp8._stacked(bases), fp8._stacked(bases, transposed=True)
    assert torch.equal(by_output.view(torch.uint8), by_input.view(torch.uint8).t())
    exact = torch.cat([fp8.weight(base, torch.float32).float().cpu() for base in bases])
    exact *= fp8.row_scales(bases).cpu().reciprocal().unsqueeze(1)
    found = by_output.float().cpu()
    assert (found.abs().amax(1) == LARGEST).all()
    assert (found != exact.to(E4M3).float()).float().mean() < 1e-4
    assert ((found - exact).abs() <= torch.maximum(exact.abs() / 16, torch.tensor(2.0**-10)) * (1 + 1e-5)).all()


@pytest.mark.parametrize("make", [_nf4, _linear, _kept])
@by_shape
@by_tokens
def test_products_are_those_of_the_rounded_numbers(tokens, shape, make):
    """The sums of the tensor cores keep fewer bits than float32 does, but more than bf16."""
    bases, outputs = [make(*shape), make(*shape)], 2 * shape[0]
    x, residual, dy = _random(tokens, shape[1]).cuda(), _random(tokens, outputs).cuda(), _random(tokens, outputs).cuda()
    weights, scales = fp8._stacked(bases).double(), fp8.row_scales(bases).double()
    values, of_rows = (part.double() for part in fp8.quantise_rows(x))
    expected = values @ weights.t() * scales * of_rows.unsqueeze(1) + residual
    found = fp8.multiply(x, bases, torch.empty_like(residual), residual)
    _assert_close(found, expected)
    values, of_rows = (part.double() for part in fp8.quantise_rows(dy, fp8.row_scales(bases)))
    _assert_close(fp8.multiply_backward(dy, bases), values @ weights * of_rows.unsqueeze(1))


@by_shape
def test_kept_weights_are_rounded_as_on_the_cpu(shape):
    """By the scales found here, in whose last bit torch divides otherwise than there: that decides many ties."""
    matrix = _random(*shape, size=0.02)
    matrix[shape[0] // 2] = 0
    (found, scales), (_, of_rows) = fp8.round_weight(matrix.cuda()), fp8.round_weight(matrix)
    torch.testing.assert_close(scales.cpu(), of_rows, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    expected = (matrix.float() * scales.cpu().reciprocal().unsqueeze(1)).to(E4M3)
    assert (found.cpu().float() != expected.float()).float().mean() < 1e-4


@by_shape
def test_kept_weights_have_the_products_of_rounding_on_the_way_to_the_last_bit(shape):
    """One linear of an input and several, forward and backward."""
    for count in (1, 3):
        linears = [_linear(*shape) for _ in range(count)]
        kept, outputs = [_rounded(linear) for linear in linears], count * shape[0]
        x, dy = _random(100, shape[1]).cuda(), _random(100, outputs).cuda()
        forward = [fp8.multiply(x, bases, torch.empty_like(dy)) for bases in (linears, kept)]
        backward = [fp8.multiply_backward(dy, bases) for bases in (linears, kept)]
        assert torch.equal(fp8.row_scales(linears), fp8.row_scales(kept))
        assert torch.equal(*forward) and torch.equal(*backward)


@pytest.mark.parametrize("rows", [[16], [48, 16], [1024, 1024], [8192, 1024, 1024], [28672, 28672]], ids=str)
@pytest.mark.parametrize("columns", [16, 80, 4096, 8192])
def test_bytes_are_turned_whatever_they_are(columns, rows):
    """Those of a NaN too."""
    bases = [FP8Linear(columns, count, dtype=torch.bfloat16) for count in rows]
    for base in bases:
        bytes_ = torch.randint(0, 256, (base.out_features, columns), dtype=torch.uint8, device="cuda")
        base.weight.data, base.scales = bytes_.view(E4M3), torch.ones(base.out_features, device="cuda")
    by_output = torch.cat([base.weight.data.view(torch.uint8) for base in bases])
    assert torch.equal(fp8._stacked(bases).view(torch.uint8), by_output)
    assert torch.equal(fp8._stacked(bases, transposed=True).view(torch.uint8), by_output.t())


@by_shape
def test_kept_weights_are_dequantised_as_on_the_cpu(shape):
    base = _kept(*shape)
    found = base.dequantised(torch.bfloat16)
    base.weight.data, base.scales = base.weight.data.cpu(), base.scales.cpu()
    assert torch.equal(found.cpu(), base.dequantised(torch.bfloat16))


def _assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 2 * 2**-8 * expected.norm()  # rounded to bf16 twice


@pytest.mark.parametrize("batch", [packed, padded])
def test_a_whole_model_is_as_near_as_on_the_cpu(batch):
    """Both against float64 without rounding: the errors are those of e4m3, no larger here than there."""
    model = adapted(plain(torch.bfloat16), dropout=0.3)
    inputs, _ = batch()
    more = {"dropout_keys": torch.randint(-(2**31), 2**31, (inputs["counts"].numel(),)).int()}
    exact = run(written_out_copy(model.double()), inputs, **more)
    model.to(torch.bfloat16)

    def in_fp8(kept: int, device: str):
        ours = written_out_copy(model, kept)
        use_fp8_products(decoder(ours))
        return run(ours.to(device), inputs, **more)

    on_cpu = in_fp8(LAYERS, "cpu")
    kept, recomputed = (in_fp8(count, "cuda") for count in (LAYERS, 0))
    for name, value in exact.items():  # FlashAttention's backward adds in any order: kept and recomputed may differ
        errors = [(found[name].cpu().double() - value).norm() for found in (kept, recomputed, on_cpu)]
        assert max(errors[:2]) < 2 * errors[2], name  # other values are rounded up, and errors of one value go along
