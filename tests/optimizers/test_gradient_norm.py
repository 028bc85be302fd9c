"""Clipping and AdamW on each rank's own rows: as torch does them on whole tensors and on DTensors."""

import math
import os

import pytest
import torch
from ranks import run_ranks, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fitune.optimizers import adamw_rows
from fitune.optimizers.adamw_rows import AdamWOnRows
from fitune.optimizers.gradient_norm import clip_gradients, norm_of_gradients

SIZES = [(5, 3), (1, 4), (7,), (6, 2)]
"Of weights: the second has no row for a second rank."


def _model(shard=lambda tensor: tensor) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.ParameterList([torch.nn.Parameter(shard(torch.randn(size))) for size in SIZES])
    for parameter in model[:-1]:
        parameter.grad = shard(torch.randn(parameter.shape))
    return model  # the last one has no gradient


def _clipped(max_norm: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    model = _model(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
    norm = clip_gradients(model.parameters(), max_norm)
    return norm, [whole(parameter.grad) for parameter in model[:-1]]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("max_norm", [1.0, 100.0, math.inf])
def test_gradients_are_clipped_as_the_whole_ones(max_norm, ranks):
    model = _model()
    exact = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    for norm, gradients in run_ranks(_clipped, ranks, max_norm):
        torch.testing.assert_close(norm, exact)
        for found, parameter in zip(gradients, model[:-1], strict=True):
            torch.testing.assert_close(found, parameter.grad)


@pytest.mark.parametrize(("max_norm", "writes"), [(100.0, 0), (1.0, 1)])
def test_gradients_in_host_ram_that_are_small_enough_are_not_written_again(max_norm, writes):
    model = _model()
    before = [parameter.grad._version for parameter in model[:-1]]
    clip_gradients(model.parameters(), max_norm)
    assert [parameter.grad._version - was for parameter, was in zip(model[:-1], before, strict=True)] == [writes] * 3


def test_the_norm_of_bf16_gradients_is_float32():
    """As that of the same numbers in float32, where bf16 would leave 8 bits of it."""
    model = _model()
    for parameter in model[:-1]:
        gradient, parameter.grad_dtype = parameter.grad.bfloat16(), None
        parameter.grad = gradient
    exact = torch.cat([parameter.grad.double().flatten() for parameter in model[:-1]]).norm()
    norm = norm_of_gradients(model.parameters())
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact.item(), rel=1e-6)


def test_a_gradient_that_is_no_number_makes_the_norm_none():
    model = _model()
    model[1].grad[0, 0] = float("nan")
    assert clip_gradients(model.parameters(), 1.0).isnan()


def _stepped(kind) -> list[torch.Tensor]:
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    model = _model(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
    optimizer = kind(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert all(hasattr(value, "full_tensor") for value in states if value.ndim), "a checkpoint reads DTensors"
    return [*map(whole, model), *map(whole, states)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_is_that_of_torchs_adamw_to_the_last_bit(ranks):
    for mine, torchs in zip(
        run_ranks(_stepped, ranks, AdamWOnRows), run_ranks(_stepped, ranks, torch.optim.AdamW), strict=True
    ):
        assert all(map(torch.equal, mine, torchs))


def _two_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip) -> list[torch.Tensor]:
    """The norms of two steps, of which the second is not clipped, and the weights then."""
    gradients = [parameter.grad.clone() for parameter in model[:-1]]
    norms = []
    for max_norm in (1.0, math.inf):
        for parameter, gradient in zip(model[:-1], gradients, strict=True):
            parameter.grad = gradient.clone()
        norms.append(clip(max_norm))
        optimizer.step()
    return [*map(whole, [*norms, *model])]


def _clipped_in_the_step(fused: bool) -> list[torch.Tensor]:
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    model = _model(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
    optimizer = AdamWOnRows(model.parameters(), lr=0.1, fused=fused)
    return _two_steps(model, optimizer, optimizer.clip)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_takes_gradients_as_if_they_were_clipped(fused, ranks):
    """And the next one, which is not clipped, as they are."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    exact = _two_steps(model, optimizer, lambda limit: torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    assert exact[0] > 2
    for found in run_ranks(_clipped_in_the_step, ranks, fused):
        for ours, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_step_of_two_devices_scales_each_one_by_a_number_that_lies_there(monkeypatch):
    """torch's step would begin in host RAM before the number has come there from a GPU."""
    calls = []
    monkeypatch.setattr(adamw_rows, "adamw", lambda weights, *_, grad_scale, **__: calls.append((weights, grad_scale)))
    optimizer = AdamWOnRows(_model().parameters(), lr=0.1, fused=True)
    devices = ["cpu", "meta", "cpu"]
    parts = [tuple(torch.zeros(2, device=device) for _ in range(5)) for device in devices]
    monkeypatch.setattr(optimizer, "_parts", lambda group: parts)
    optimizer._scale = torch.tensor(0.5)
    optimizer.step()
    assert sorted((len(weights), scale.device.type) for weights, scale in calls) == [(1, "meta"), (2, "cpu")]
    assert all(weight.device == scale.device for weights, scale in calls for weight in weights)
