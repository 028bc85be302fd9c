"""AdamW of what lies in host RAM on a GPU: streams, slots and page-locking change nothing but the time."""

import copy

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from fitune.config.optimizer_pieces import FLOAT_SLOT_BYTES, SLOTS
from fitune.optimizers import adamw_streamed
from fitune.optimizers.adamw_streamed import AdamWStreamed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
SIZES = [(16, 1024), (1024, 16), (7,), *[(64, 512)] * 60, (1500, 2048), (3, 21)]
"Small ones that lie side by side in a piece, and one that is larger than some pieces; moments of both kinds of locks."
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1, "fused": True}
SOME_ROUNDINGS = 4 * torch.finfo(torch.float32).eps


def _gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(step)
    return [torch.randn(size, generator=generator, device="cuda") for size in SIZES]


@pytest.mark.parametrize("piece", [2**14, 2**22])
@pytest.mark.parametrize("page_locked", [True, False])
def test_the_step_is_that_of_torchs_adamw_on_the_gpu(page_locked, piece, monkeypatch):
    """The GPU is busy before each step, with memory that the slots take over; half of the steps follow a resume."""
    monkeypatch.setattr(adamw_streamed, "FLOAT_PIECE", piece)
    start = [torch.randn(size) for size in SIZES]
    mine = [torch.nn.Parameter(value.pin_memory() if page_locked else value.clone()) for value in start]
    theirs = [torch.nn.Parameter(value.cuda()) for value in start]
    optimizer = AdamWStreamed(mine, torch.device("cuda", torch.cuda.current_device()), **OPTIONS)
    reference = torch.optim.AdamW(theirs, **OPTIONS)
    big = torch.full((8192, 8192), 0.5, device="cuda")
    for step in range(4):
        for on_gpu, in_ram, gradient in zip(theirs, mine, _gradients(step), strict=True):
            on_gpu.grad = gradient
            in_ram.grad = gradient.to("cpu", non_blocking=page_locked)  # as FSDP
        torch.cuda.synchronize()
        max_norm = 1.0 if step % 2 else 1e6
        norm = optimizer.clip(max_norm)  # added up by the CPU, in another order
        exact = torch.nn.utils.get_total_norm([parameter.grad.double() for parameter in theirs])
        torch.testing.assert_close(norm, exact.float().cpu(), rtol=1e-4, atol=0)
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for parameter in theirs:
            parameter.grad *= scale.item()
        product = big @ big
        total = product.mean()
        del product
        optimizer.step()
        reference.step()
        assert total == 0.25 * 8192
        for found, expected in zip(mine, theirs, strict=True):
            _assert_equal_but_for_rounding(found, expected)
            for key in ("exp_avg", "exp_avg_sq"):
                assert optimizer.state[found][key].is_pinned()
                _assert_equal_but_for_rounding(optimizer.state[found][key], reference.state[expected][key])
        if step == 1:
            saved = copy.deepcopy(optimizer.state_dict())
            assert not saved["state"][0]["exp_avg"].is_pinned(), "this shows nothing"
            optimizer.load_state_dict(saved)


def _assert_equal_but_for_rounding(found, expected):
    scale = expected.detach().abs().max().item()
    torch.testing.assert_close(
        found.detach(), expected.detach().cpu(), rtol=SOME_ROUNDINGS, atol=SOME_ROUNDINGS * max(scale, 1.0)
    )


def test_the_slots_take_memory_during_a_step_alone():
    weight = torch.nn.Parameter(torch.ones(1000))
    weight.grad = torch.ones(1000)
    optimizer = AdamWStreamed([weight], torch.device("cuda", torch.cuda.current_device()), **OPTIONS)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    assert torch.cuda.memory_allocated() == before
    taken = torch.cuda.max_memory_allocated() - before
    assert SLOTS * FLOAT_SLOT_BYTES <= taken < 1.01 * SLOTS * FLOAT_SLOT_BYTES


def test_moments_of_sharded_weights_stay_in_host_ram():
    """Small ones, which are page-locked as copies, and large ones."""
    mesh = DeviceMesh("cuda", torch.tensor([0]), _init_backend=False, _rank=0)
    weights = []
    for rows in (4, 4096):
        meta = TensorMeta(torch.Size([rows, 1024]), (1024, 1), torch.float32)
        spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=meta)
        values = (torch.ones(rows, 1024) for _ in range(2))
        weight, gradient = (DTensor(value, spec, requires_grad=False) for value in values)
        weights.append(torch.nn.Parameter(weight))
        weights[-1].grad = gradient
    optimizer = AdamWStreamed(weights, torch.device("cuda", torch.cuda.current_device()), **OPTIONS)
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.memory_allocated() == before
    for weight in weights:
        for key in ("exp_avg", "exp_avg_sq"):
            rows = optimizer.state[weight][key].to_local()
            assert rows.is_pinned() and rows.unique().numel() == 1
