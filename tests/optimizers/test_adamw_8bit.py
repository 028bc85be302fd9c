"""AdamW with 8-bit moments and bf16 weights: the arithmetic, and that no result hangs on how rows are dealt."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fitune.model.stochastic_rounding import rounded
from fitune.optimizers import host_states
from fitune.optimizers.adamw_8bit import AdamW8bit, block_of
from fitune.optimizers.adamw_step import codes, update_rows
from fitune.optimizers.moment import Moment, Step

STEP = Step(rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.1, number=1, gradient_scale=1.0, key=7,
            first_element=0)  # fmt: skip


def _moment(rows: int, columns: int, block: int = 256) -> Moment:
    return Moment(torch.zeros(rows, columns, dtype=torch.uint8), torch.zeros(rows, columns // block))


def test_rounding_is_right_on_average_and_never_beyond_the_two_neighbours():
    exact = torch.tensor([1.0, 1 + 2**-9, -1 - 2**-10, 3e-5, -0.0, 1.9999]).repeat(20_000, 1)
    drawn = rounded(exact.clone(), 7, 0)
    assert drawn.dtype == torch.bfloat16
    low = (exact.view(torch.int32) & -0x10000).view(torch.float32)
    high = ((exact.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert ((drawn == low) | (drawn == high)).all()
    share_of_ups = (drawn != low).float().mean(0)
    share_of_way = ((exact - low) / (high - low))[0]
    deviation = (share_of_way * (1 - share_of_way) / len(exact)).sqrt()
    assert ((share_of_ups - share_of_way).abs() <= 5 * deviation).all()
    assert torch.equal(drawn[:, 0], exact[:, 0].bfloat16()), "what is a bf16 number stays"


def test_what_is_drawn_differs_by_element_weight_and_step():
    exact = torch.full((4096,), 1 + 2**-8.5)
    first = rounded(exact.clone(), 7, 0)
    assert first.unique().numel() == 2
    assert torch.equal(first, rounded(exact.clone(), 7, 0))
    for other in ((8, 0), (7, 4096)):
        assert 0.2 < (rounded(exact.clone(), *other) != first).float().mean() < 0.7


def test_a_small_change_is_kept_on_average_and_lost_without_stochastic_rounding():
    """100 steps of 1e-5 each on weights of 1, beside which bf16's next number is 0.0039 away."""

    def trained(stochastic: bool) -> torch.Tensor:
        weight, moments = torch.ones(64, 256, dtype=torch.bfloat16), (_moment(64, 256), _moment(64, 256))
        gradient = torch.full_like(weight, 0.01)
        for number in range(1, 101):
            step = replace(STEP, rate=1e-5, decay=0.0, number=number, key=number * 7919, stochastic=stochastic)
            update_rows(weight, gradient, *moments, step)
        return weight.float()

    assert (trained(stochastic=False) == 1).all()
    moved = 1 - trained(stochastic=True).mean()
    below_one = 2**-8  # distance of bf16's numbers there
    deviation = math.sqrt(100 * 1e-5 * below_one / (64 * 256))
    assert moved.item() == pytest.approx(100 * 1e-5, abs=5 * deviation)


def test_one_step_is_adamw_but_for_the_rounding_of_weights():
    """The first step's moments come from the gradient, unrounded: what differs from torch's is bf16's rounding."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 512, generator=generator).bfloat16()
    gradient = torch.randn(32, 512, generator=generator).bfloat16()
    exact = torch.nn.Parameter(weight.float())
    exact.grad = gradient.float() * 0.25
    torch.optim.AdamW([exact], lr=STEP.rate, betas=(0.9, 0.999), eps=STEP.eps, weight_decay=STEP.decay).step()
    update_rows(weight, gradient, _moment(32, 512), _moment(32, 512), replace(STEP, gradient_scale=0.25))
    spacing = 2.0 ** (torch.floor(torch.log2(exact.detach().abs())) - 7)
    assert ((weight.float() - exact.detach()).abs() <= 1.001 * spacing).all()


def test_moments_follow_adamws_within_the_codes_precision():
    generator = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(torch.randn(16, 512, generator=generator).bfloat16())
    reference = torch.nn.Parameter(parameter.detach().float())
    optimizer, exact = AdamW8bit([parameter], lr=1e-3), torch.optim.AdamW([reference], lr=1e-3)
    for _ in range(20):
        parameter.grad = torch.randn(16, 512, generator=generator).bfloat16()
        reference.grad = parameter.grad.float()
        optimizer.step()
        exact.step()
    state = optimizer.state[parameter]
    assert state["exp_avg"].dtype == torch.uint8 and state["exp_avg_scale"].shape == (16, 2)
    exact = exact.state[reference]
    for key, wanted, code in zip(
        ("exp_avg", "exp_avg_sq_root"), (exact["exp_avg"], exact["exp_avg_sq"].sqrt()), codes(torch.device("cpu")),
        strict=True,
    ):  # fmt: skip
        found = Moment(state[key], state[f"{key}_scale"]).read(code)
        largest = wanted.view(16, 2, 256).abs().amax(-1, keepdim=True)
        apart = (found.view(16, 2, 256) - wanted.view(16, 2, 256)).abs() / largest
        gap = code.values.diff().max().item()  # each step rounds by half of it at most, and older ones fade
        assert apart.max() <= gap / 2 / (1 - 0.9)


@pytest.mark.parametrize("code", codes(torch.device("cpu")), ids=["signed", "unsigned"])
def test_a_number_has_the_nearest_code_after_one_comparison(code):
    """As the kernel finds it: also of middles themselves, of their neighbours, and of each bucket's ends."""
    middles = code.middles[:-1]
    halves = torch.arange(2**16, dtype=torch.int32) << 16
    ends = torch.cat([halves, halves | 0xFFFF]).view(torch.float32)
    beside = [middles.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    numbers = torch.cat([middles, *beside, ends[ends.isfinite()]])
    start = code.starts[numbers.view(torch.int32) >> 16 & 0xFFFF].int()
    assert torch.equal(start + (numbers > code.middles[start]), torch.bucketize(numbers, code.middles).int())
    some = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    apart = (some[:, None].double() - code.values.double()).abs()
    found = apart.gather(1, torch.bucketize(some, code.middles)[:, None]).squeeze(1)
    torch.testing.assert_close(found, apart.amin(1), rtol=0, atol=torch.finfo(torch.float32).eps)


def test_an_element_with_small_gradients_beside_large_ones_does_not_jump():
    """The root of its mean square is nearest to the code of zero, its mean is not; divided by eps it would jump.

    The large gradient changes its sign, so its mean is small beside its root.
    """
    parameter = torch.nn.Parameter(torch.zeros(1, 256, dtype=torch.bfloat16))
    optimizer = AdamW8bit([parameter], lr=1e-3)
    for number in range(10):
        parameter.grad = torch.full((1, 256), 0.0 if number == 9 else 1e-6, dtype=torch.bfloat16)
        parameter.grad[0, 0] = 10.0 * (-1) ** number
        before = parameter.detach().float().clone()
        optimizer.step()
        assert (parameter.detach().float() - before).abs().max() <= 4 * 1e-3


def test_elements_of_small_gradients_beside_large_ones_go_as_fast_as_adamws():
    """Mean squares themselves, in 8 bits, lose what is added to a small one, and its steps grow: by 13 % here."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.ones(64, 256).index_fill_(1, torch.tensor([0, 1]), 300.0)
    step, moments = replace(STEP, rate=1.0, decay=0.0, stochastic=False), (_moment(64, 256), _moment(64, 256))
    mean, square = torch.zeros(64, 256), torch.zeros(64, 256)
    for number in range(1, 101):
        gradient = (sizes * torch.randn(64, 256, generator=generator)).bfloat16()
        weight = torch.zeros(64, 256, dtype=torch.bfloat16)
        update_rows(weight, gradient, *moments, replace(step, number=number))
        mean.lerp_(gradient.float(), 0.1)
        square.mul_(0.999).addcmul_(gradient.float(), gradient.float(), value=0.001)
    wanted = -(mean / (1 - 0.9**100)) / (square / (1 - 0.999**100)).sqrt()
    found, wanted = weight.float()[:, 2:], wanted[:, 2:]
    assert 0.95 <= (found * wanted).sum() / wanted.square().sum() <= 1.05


def test_which_weights_have_8_bit_moments_follows_from_their_whole_shape():
    shapes = {(512,): None, (10, 512): 256, (3, 576): 64, (4, 384): 128, (8, 100): None, (0, 512): 256}
    assert {shape: block_of(torch.empty(shape)) for shape in shapes} == shapes


def test_the_norm_is_exact_where_bf16_sums_are_not_and_the_gradients_stay():
    parameter = torch.nn.Parameter(torch.zeros(300, 512, dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(2)
    parameter.grad = torch.randn(300, 512, generator=generator).bfloat16()
    before = parameter.grad.clone()
    optimizer = AdamW8bit([parameter], lr=1e-3)
    exact = parameter.grad.double().norm()
    norm = optimizer.clip(1.0)
    assert abs(norm.double() / exact - 1) <= torch.finfo(torch.float32).eps * math.sqrt(parameter.numel())
    assert torch.equal(parameter.grad, before)
    optimizer.step()
    first_moment = Moment(optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_scale"])
    clipped = 0.1 * before.float() / norm
    found = first_moment.read(codes(torch.device("cpu"))[0])
    assert (found - clipped).norm() <= 0.02 * clipped.norm()


SHAPES = {"matrix": (10, 512), "vector": (9,), "odd": (7, 100), "fewer rows than ranks": (2, 256)}


def _train_here() -> dict[str, torch.Tensor]:
    """Three steps on weights and gradients that depend on no rank; weights, states and norms, gathered."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator, parameters = torch.Generator().manual_seed(3), {}
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=generator).bfloat16()
        parameters[name] = torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
    optimizer, found = AdamW8bit(parameters.values(), lr=1e-2, weight_decay=0.1, seed=5), {}
    for number in range(3):
        for parameter in parameters.values():
            gradient = torch.randn(parameter.shape, generator=generator).bfloat16()
            parameter.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        found[f"norm {number}"] = optimizer.clip(1.0)
        optimizer.step()
    for name, parameter in parameters.items():
        state = {key: value for key, value in optimizer.state[parameter].items() if value.ndim}
        for key, mine in ({"weight": parameter.to_local().detach()} | state).items():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, mine)
            found[f"{name} {key}"] = torch.cat([part for part in parts if len(part)])
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks_does_the_same(ranks):
    """Elements of the same gradients are the same: the same draws, the same blocks. Norms differ by a rounding."""
    alone, several = run_ranks(_train_here, 1)[0], run_ranks(_train_here, ranks)[0]
    assert set(alone) == set(several)
    for name, value in alone.items():
        apart = (several[name] != value).float().mean()
        if name.startswith("norm"):
            assert several[name].item() == pytest.approx(value.item(), rel=1e-6)
        elif several[name].dtype == torch.float32:  # a norm's rounding goes into every gradient
            assert (several[name] - value).norm() <= 1e-5 * value.norm(), name
        else:
            assert apart <= 0.01, f"{name}: {apart:.2%} differ: more than the draws that a norm's rounding tips"


def test_gradients_of_several_passes_are_added_up_in_host_ram_piece_by_piece(monkeypatch):
    """Of plain weights, whose hooks autograd calls; pieces end within the weight. Small ones stay beside the weight."""
    monkeypatch.setattr(host_states, "PIECE", 3 * 256)
    generator = torch.Generator().manual_seed(4)
    start = [torch.randn(shape, generator=generator).bfloat16() for shape in ((10, 256), (9,))]
    inputs = [torch.randn(256, generator=generator).bfloat16() for _ in range(3)]
    found = {}
    for offload in (False, True):
        matrix, vector = (torch.nn.Parameter(value.clone()) for value in start)
        optimizer = AdamW8bit([matrix, vector], lr=1e-2, seed=1, offload=offload)
        for step in range(2):
            for x in inputs[step:]:
                ((matrix @ x).square().sum() + vector.square().sum()).backward()
            assert (matrix.grad is None) == offload and vector.grad is not None
            norm = optimizer.clip(1.0)
            optimizer.step()
            matrix.grad = vector.grad = None
        found[offload] = [matrix, vector, norm, *optimizer.state[matrix].values(), *optimizer.state[vector].values()]
    assert all(torch.equal(*pair) for pair in zip(found[False], found[True], strict=True))
