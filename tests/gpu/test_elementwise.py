"""The kernels of the decoder layer's elementwise work against their formulas on the CPU."""

import math
from dataclasses import replace

import pytest
import torch
from reference_layers import LAYERS, adapted, packed, padded, plain, run, written_out_copy

from fitune.model import attention, elementwise, layer_pass
from fitune.model.elementwise import Dropout

if torch.cuda.is_available():
    from fitune.model import low_rank_triton, up_gradients_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]

TOKENS = [1, 5, 1000]
CHANNELS = [576, 4096, 8192, 14336]
DTYPES = [torch.float32, torch.bfloat16]
EPSILON = 1e-5
P = 0.3

by_tokens = pytest.mark.parametrize("tokens", TOKENS)
by_channels = pytest.mark.parametrize("channels", CHANNELS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_dropout = pytest.mark.parametrize("dropping", [False, True], ids=["all", "dropout"])


@pytest.fixture
def random():
    """Fresh numbers in each run of the tests; the seed is shown when one fails."""
    seed = torch.seed()
    print(f"seed {seed}")
    return lambda *shape, dtype=torch.float32: torch.randn(*shape).to(dtype)


def _dropout(tokens: int) -> Dropout:
    return Dropout(P, torch.randint(-(2**31), 2**31, (tokens,)).int(), 7)


def _on_gpu(value):
    if isinstance(value, Dropout):
        return replace(value, keys=value.keys.cuda())
    return value.cuda() if isinstance(value, torch.Tensor) else value


def _assert_close(found: torch.Tensor, exact: torch.Tensor, roundings: int) -> None:
    """`exact` is float64. Each rounding to the kernel's dtype is off by half a unit of the last place at most.

    float32 rounds in every operation, of which a row's sum has at most log2 of its length more.
    """
    assert found.shape == exact.shape
    assert found.isfinite().all()
    if found.dtype == torch.float32:
        roundings += 16 + math.log2(exact.shape[-1])
    share = roundings * torch.finfo(found.dtype).eps / 2
    found = found.cpu().double()
    assert (found - exact).norm() <= share * exact.norm()
    # no element is off by itself: its own size and the others' common size tell how far it may be
    allowed = 4 * share * (exact.abs() + exact.norm() / math.sqrt(exact.numel()))
    assert ((found - exact).abs() <= allowed).all()


def _compare(function, *arguments, roundings: int) -> None:
    """What `function` returns and what it writes into its tensors, on the GPU and in float64 on the CPU."""
    on_gpu = [_on_gpu(argument) for argument in arguments]
    exact = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in exact]
    found, expected = function(*on_gpu), function(*exact)
    pairs = list(zip(_flat(found), _flat(expected), strict=True))
    for one, other, old in zip(on_gpu, exact, before, strict=True):
        if isinstance(other, torch.Tensor):
            if torch.equal(other, old):
                assert torch.equal(one.cpu().double(), other)  # what the formula only reads
            else:
                pairs.append((one, other))
    assert pairs
    for ours, theirs in pairs:
        assert ours.is_cuda
        _assert_close(ours, theirs, roundings)


def _flat(value) -> list[torch.Tensor]:
    return [] if value is None else list(value) if isinstance(value, tuple) else [value]


@by_dropout
@by_dtype
@by_channels
@by_tokens
def test_rms_norm(tokens, channels, dtype, dropping, random):
    x, weight = random(tokens, channels, dtype=dtype), random(channels, dtype=dtype)
    dropout = _dropout(tokens) if dropping else None
    _compare(elementwise.rms_norm, x, weight, EPSILON, dropout, roundings=3)
    _compare(elementwise.dropped_norm, x, weight, EPSILON, dropout, roundings=3)


@by_dtype
@by_channels
@by_tokens
def test_rms_norm_backward(tokens, channels, dtype, random):
    gradient, x, residual = (random(tokens, channels, dtype=dtype) for _ in range(3))
    weight = random(channels, dtype=dtype)
    _compare(elementwise.rms_norm_backward, gradient, x, weight, EPSILON, residual, roundings=1)


@by_dtype
@pytest.mark.parametrize("channels", [64, 80, 128, *CHANNELS])
@by_tokens
def test_a_trained_rms_norms_backward(tokens, channels, dtype, random):
    gradient, x, residual = (random(tokens, channels, dtype=dtype) for _ in range(3))
    weight = random(channels, dtype=dtype)
    inputs = gradient, x, weight, EPSILON, residual
    found, of_weight = elementwise.trained_rms_norm_backward(*(_on_gpu(value) for value in inputs))
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in inputs]
    expected, exact = elementwise.trained_rms_norm_backward(*wide)
    _assert_close(found, expected, roundings=1)
    assert of_weight.dtype == torch.float32
    rounded = torch.finfo(dtype).eps  # the norm, before it is multiplied by its gradient
    assert (of_weight.cpu().double() - exact).norm() <= 8 * rounded * exact.norm()


@by_dtype
@pytest.mark.parametrize("channels", [64, 80, 128])
def test_norms_of_heads(channels, dtype, random):
    """Rows of a head's size, with nothing to add to their gradient."""
    gradient, x = (random(1000, channels, dtype=dtype) for _ in range(2))
    weight = random(channels, dtype=dtype)
    _compare(elementwise.rms_norm, x, weight, EPSILON, None, roundings=3)
    _compare(elementwise.rms_norm_backward, gradient, x, weight, EPSILON, None, roundings=1)


@by_dropout
@by_dtype
@by_channels
@by_tokens
def test_swiglu(tokens, channels, dtype, dropping, random):
    gate_up = random(tokens, 2 * channels, dtype=dtype)
    _compare(elementwise.swiglu, gate_up, _dropout(tokens) if dropping else None, roundings=3)


@by_dropout
@by_dtype
@by_channels
@by_tokens
def test_swiglu_backward(tokens, channels, dtype, dropping, random):
    gradient = random(tokens, channels, dtype=dtype)
    gate_up = random(tokens, 2 * channels, dtype=dtype)
    _compare(elementwise.swiglu_backward_, gradient, gate_up, _dropout(tokens) if dropping else None, roundings=3)


@by_dtype
@by_channels
@by_tokens
def test_drop(tokens, channels, dtype, random):
    _compare(elementwise.drop, random(tokens, channels, dtype=dtype), _dropout(tokens), roundings=1)


@by_dtype
@pytest.mark.parametrize(("heads", "size"), [(32, 128), (8, 128), (64, 128), (9, 64), (3, 64)])
@by_tokens
def test_rope_in_place_within_a_wider_row(tokens, heads, size, dtype, random):
    """Query, key and value lie side by side; only the heads in the middle turn."""
    qkv = random(tokens, (heads + 3) * size, dtype=dtype)
    angles = random(tokens, size // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(row, cos, sin):
        elementwise.rope_(row[:, 2 * size : (heads + 2) * size].unflatten(1, (heads, size)), cos, sin)

    _compare(rotate, qkv, cos, sin, roundings=1)
    wide = qkv.cuda()
    rotate(wide, cos.cuda(), sin.cuda())
    for outside in (slice(0, 2 * size), slice((heads + 2) * size, None)):
        assert torch.equal(wide[:, outside].cpu(), qkv[:, outside])


@by_dtype
@pytest.mark.parametrize("placed", ["in order", "among pads", "to rows with pads"])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(32, 8, 128), (64, 8, 128), (9, 3, 64), (4, 4, 64)])
@by_tokens
def test_rope_from_places(tokens, heads, key_heads, size, placed, dtype, random):
    """Gradients are turned back by their own angles, what becomes rows by those of the places read; value's copied."""
    back = placed != "to rows with pads"
    read = tokens + 3 if placed == "among pads" else tokens
    places = None
    if placed == "among pads":
        places = torch.randperm(read)[:tokens].int()
    elif placed == "to rows with pads":
        places = torch.randint(tokens, (tokens + 3,))
    angles = random(tokens, size // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    query, key, value = random(read, heads + 2 * key_heads, size, dtype=dtype).split([heads, key_heads, key_heads], 1)

    def rotate(query, key, value, cos, sin):
        on = None if places is None else places.to(query.device)
        return elementwise.rope_from_places([query, key, value], on, cos, sin, back=back)

    _compare(rotate, query, key, value, cos, sin, roundings=1)


@by_dtype
@pytest.mark.parametrize("add", [False, True], ids=["fill", "add"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("rank", [4, 16, 24, 128])
@pytest.mark.parametrize("widths", [(4096,), (576, 192, 192), (4096, 1024, 1024), (14336, 14336)], ids=str)
@by_tokens
def test_adapters_ups(tokens, widths, rank, with_residual, add, dtype, random):
    """The output is a part of a wider row, as with gate and up of a tile."""
    channels, ranks = sum(widths), len(widths) * rank
    up, low = random(channels, rank, dtype=dtype), random(tokens, ranks + 8, dtype=dtype)[:, 8:]
    residual = random(tokens, channels, dtype=dtype) if with_residual else None
    before = random(tokens, channels + 64, dtype=dtype)
    out = before.cuda()[:, :channels] if add else torch.full_like(before, torch.nan, device="cuda")[:, :channels]
    low_rank_triton.fill(out, low.cuda(), up.cuda(), widths, residual=_on_gpu(residual), add=add)
    parts = zip(low.double().split(rank, 1), up.double().split(widths), strict=True)
    expected = torch.cat([of_tokens @ of_columns.t() for of_tokens, of_columns in parts], 1)
    expected += before[:, :channels].double() if add else 0
    expected += residual.double() if with_residual else 0
    _assert_close(out, expected, roundings=1)


@by_dropout
@by_dtype
@pytest.mark.parametrize("add", [False, True], ids=["fill", "add"])
@pytest.mark.parametrize("ranks", [8, 48, 192])
@by_channels
@by_tokens
def test_gradients_of_adapters_inputs(tokens, channels, ranks, add, dtype, dropping, random):
    low, down, before = (
        random(*shape, dtype=dtype) for shape in ((tokens, ranks), (ranks, channels), (tokens, channels))
    )
    dropout = _dropout(tokens) if dropping else None
    out = before.cuda()
    low_rank_triton.fill(out, low.cuda(), down.cuda().t(), (channels,), add=add, dropout=_on_gpu(dropout))
    expected = elementwise.drop(low.double() @ down.double(), dropout) + (before.double() if add else 0)
    _assert_close(out, expected, roundings=1)


@pytest.mark.parametrize("add", [False, True], ids=["fill", "add"])
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("widths", [(4096,), (576,), (4096, 1024, 1024), (14336, 14336)], ids=str)
@by_tokens
def test_both_gradients_of_adapters_ups(tokens, widths, rank, add, random):
    """Of parts of wider rows; that of B is added to sums in float32."""
    if not up_gradients_triton.has_room(torch.device("cuda", 0)):
        pytest.skip("the kernel has no room on this GPU")
    channels, ranks, dtype = sum(widths), len(widths) * rank, torch.bfloat16
    dy, low = random(tokens, channels + 64, dtype=dtype), random(tokens, ranks + 8, dtype=dtype)
    up, sums = random(channels, rank, dtype=dtype), random(channels, rank)
    out = sums.cuda() if add else torch.full_like(up, torch.nan, device="cuda")
    found = up_gradients_triton.gradients(
        dy.cuda()[:, 64:], low.cuda()[:, 8:], up.cuda(), widths, 0.5, out=out, add=add
    )
    by_linear = list(zip(dy[:, 64:].double().split(widths, 1), low[:, 8:].double().split(rank, 1), strict=True))
    of_low = [part @ of_part for (part, _), of_part in zip(by_linear, up.double().split(widths), strict=True)]
    of_up = [part.t() @ of_tokens for part, of_tokens in by_linear]
    _assert_close(found, 0.5 * torch.cat(of_low, 1), roundings=1)
    _assert_close(out, torch.cat(of_up) + (sums.double() if add else 0), roundings=1)


@by_channels
@by_tokens
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("place", [1, 320])
def test_masks_are_those_of_the_cpu_to_the_last_bit(place, p, channels, tokens):
    keys = torch.randint(-(2**31), 2**31, (tokens,)).int()
    dropout = Dropout(p, keys, place)
    expected = elementwise.factors(dropout, channels)
    ones = torch.ones(tokens, channels, device="cuda")
    assert torch.equal(elementwise.factors(_on_gpu(dropout), channels).cpu(), expected)
    assert torch.equal(elementwise.drop(ones, _on_gpu(dropout)).cpu(), expected)
    out = torch.empty_like(ones)
    low_rank_triton.fill(out, ones[:, :1], ones[:1].t(), (channels,), add=False, dropout=_on_gpu(dropout))
    assert torch.equal(out.cpu(), expected)


def test_all_kernels_draw_the_same_mask():
    """The zeros of each kernel's dropped copy."""
    tokens, channels = 33, 4096
    dropout = _dropout(tokens)
    kept = elementwise.factors(dropout, channels) != 0
    dropout, x = _on_gpu(dropout), torch.rand(tokens, 2 * channels, device="cuda") + 0.5
    half, ones = x[:, :channels].contiguous(), torch.ones(channels, device="cuda")
    for found in (
        elementwise.rms_norm(half, ones, EPSILON, dropout)[1],
        elementwise.swiglu(x, dropout)[1],
        elementwise.swiglu_backward_(half, x.clone(), dropout),
        elementwise.drop(half, dropout),
    ):
        assert torch.equal((found != 0).cpu(), kept)


@pytest.mark.parametrize(("query_heads", "heads", "size"), [(32, 8, 128), (9, 3, 64), (64, 8, 128)])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 130, 64], [700, 300], [2048] * 2, [3000], [2900, 3000, 3072]], ids=str)
def test_attention_forward_and_backward(lengths, query_heads, heads, size, random):
    """bf16, the kernel's dtype; the CPU in float64. Inputs are views of one row, as in the layer."""
    tokens = sum(lengths)
    columns = [count * size for count in (query_heads, heads, heads)]
    row = random(tokens, sum(columns), dtype=torch.bfloat16)
    gradient = random(tokens, query_heads, size, dtype=torch.bfloat16)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    scaling = size**-0.5

    def compute(row, gradient, bounds):
        packed = row.unflatten(1, (-1, size)), heads
        output, statistics = attention.forward(*packed, bounds, max(lengths), scaling)
        rest = statistics, bounds, max(lengths), scaling
        gradients, places = attention.backward(gradient, output, *packed, *rest)
        return [output, *(part if places is None else part[places] for part in gradients)]

    found = compute(row.cuda(), gradient.cuda(), bounds.cuda())
    expected = compute(row.double(), gradient.double(), bounds)
    largest = max(value.norm() for value in expected[1:])
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape
        # Probabilities, output and gradients are rounded to bf16 a few times in a row; one token attends to itself
        # alone, where the gradients of query and key vanish and only rounding is left.
        assert (ours.cpu().double() - exact).norm() <= 4 * 2**-8 * max(exact.norm(), 0.1 * largest)


def _assert_as_exact_as_on_the_cpu(model, inputs: dict, **more) -> None:
    """bf16 on both, each against float64: chance set aside, the kernels' errors are no larger."""
    exact = run(written_out_copy(model.double()), inputs, **more)
    model.to(torch.bfloat16)  # as before: all its values came from there
    on_cpu = run(written_out_copy(model), inputs, **more)
    for kept in (0, LAYERS):
        on_gpu = run(written_out_copy(model, kept).cuda(), inputs, **more)
        for name, value in exact.items():
            errors = [(found[name].cpu().double() - value).norm() for found in (on_gpu, on_cpu)]
            assert errors[0] < 3 * errors[1], name


@pytest.mark.parametrize("batch", [packed, padded])
def test_a_whole_model_is_as_exact_as_on_the_cpu(batch):
    inputs, _ = batch()
    keys = torch.randint(-(2**31), 2**31, (inputs["counts"].numel(),)).int()
    _assert_as_exact_as_on_the_cpu(adapted(plain(torch.bfloat16), dropout=P), inputs, dropout_keys=keys)


@pytest.mark.parametrize("tile", [16384, 8], ids=["whole", "tiles"])
@pytest.mark.parametrize("options", [{}, {"kind": "qwen3", "head_dim": 16}, {"attention_bias": True}], ids=str)
def test_so_is_a_whole_trained_model(options, tile, monkeypatch):
    """Every parameter of its layers."""
    monkeypatch.setattr(layer_pass, "MLP_TILE", tile)
    model, (inputs, _) = plain(torch.bfloat16, **options).train(), packed()
    model.model.embed_tokens.requires_grad_(False)
    _assert_as_exact_as_on_the_cpu(model, inputs)
