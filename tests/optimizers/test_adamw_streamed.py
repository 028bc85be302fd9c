"""AdamW of what lies in host RAM, piece by piece: the step of torch's AdamW on whole tensors; runs go on with it."""

import copy
import json
import math
import os
import shutil

import pytest
import torch
from ranks import run_ranks, train_here, whole
from rounding import additions_to_a_step, assert_curve_equal_but_for_rounding
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fitune.config.schema import Run
from fitune.optimizers import adamw_streamed
from fitune.optimizers.adamw_rows import AdamWOnRows
from fitune.optimizers.adamw_streamed import AdamWStreamed, pieces
from fitune.optimizers.gradient_norm import clip_gradients
from fitune.training import arguments

CPU = torch.device("cpu")
PIECE = 64
SIZES = [(5, 3), (1, 4), (7,), (40, 9), (6, 2), (64,), (3, 21)]
"Of weights, of which one is larger than some pieces and several lie side by side in one; (1, 4) has rows for one rank."
LATE, WITHOUT = 4, 6
"The places of one that has its first gradient in the second step, and of one that never has any."
SOME_ROUNDINGS = 4 * torch.finfo(torch.float32).eps


def _model(shard=lambda tensor: tensor) -> torch.nn.ParameterList:
    torch.manual_seed(0)
    return torch.nn.ParameterList([torch.nn.Parameter(shard(torch.randn(size))) for size in SIZES])


def _optimizer(kind, model, **options) -> torch.optim.Optimizer:
    groups = [{"params": list(model[:3]), "weight_decay": 0.0}, {"params": list(model[3:]), "weight_decay": 0.3}]
    return kind(groups, lr=0.1, betas=(0.8, 0.95), fused=True, **options)


def _train(model, optimizer, max_norm: float, steps=range(4), shard=lambda tensor: tensor) -> list[torch.Tensor]:
    """Each step's norm, then all weights and states."""
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for place, parameter in enumerate(model):
            gradient = torch.randn(parameter.shape, generator=generator)
            has_one = place != WITHOUT and (place != LATE or step)
            parameter.grad = shard(gradient) if has_one else None
        streamed = isinstance(optimizer, AdamWStreamed)
        norms.append(optimizer.clip(max_norm) if streamed else clip_gradients(model.parameters(), max_norm))
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()
    states = [optimizer.state[p][key] for p in model if p in optimizer.state for key in sorted(optimizer.state[p])]
    return [whole(tensor).detach() for tensor in (*norms, *model, *states)]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(adamw_streamed, "FLOAT_PIECE", PIECE)


def _assert_equal_but_for_rounding(found, expected):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=SOME_ROUNDINGS, atol=SOME_ROUNDINGS)


@pytest.mark.parametrize("max_norm", [1.0, 1000.0, math.inf])
def test_a_step_is_that_of_torchs_adamw(max_norm, small_pieces):
    mine, theirs = _model(), _model()
    found = _train(mine, _optimizer(AdamWStreamed, mine, device=CPU), max_norm)
    expected = _train(theirs, _optimizer(torch.optim.AdamW, theirs), max_norm)
    _assert_equal_but_for_rounding(found, expected)


def test_no_gradient_is_written_for_clipping_and_the_next_step_has_its_own_scale():
    model = _model()
    optimizer = _optimizer(AdamWStreamed, model, device=CPU)
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.grad.clone() for parameter in model]
    assert optimizer.clip(1e-3) == pytest.approx(math.sqrt(sum(p.numel() for p in model)))
    optimizer.step()
    assert all(torch.equal(parameter.grad, was) for parameter, was in zip(model, before, strict=True))
    moments = optimizer.state[model[0]]["exp_avg"].clone()
    optimizer.step()  # nobody has asked to clip
    torch.testing.assert_close(optimizer.state[model[0]]["exp_avg"], 0.8 * moments + 0.2)


def test_what_is_not_float32_is_changed_where_it_lies():
    mine, theirs = ([torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)] for _ in range(2))
    for model in (mine, theirs):
        for parameter in model:
            parameter.grad = torch.full_like(parameter, 2)
    optimizer = AdamWStreamed(mine, CPU, lr=0.1)
    optimizer.clip(1.0)
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(mine, theirs)
    assert optimizer.state[mine[0]]["step"] == 1


def test_pieces_are_full_and_hold_every_element_once(small_pieces):
    numbers = torch.arange(sum(math.prod(size) for size in SIZES))
    tensors = [[part] * 4 for part in numbers.split([math.prod(size) for size in SIZES])]
    found = [torch.cat([part[0] for part in piece]) for piece in pieces(tensors)]
    assert torch.equal(torch.cat(found), numbers)
    assert [len(piece) for piece in found[:-1]] == [PIECE] * (len(numbers) // PIECE)


def _sharded(kind, **options) -> list[torch.Tensor]:
    adamw_streamed.FLOAT_PIECE = PIECE
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))

    def shard(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)])

    model = _model(shard)
    optimizer = _optimizer(kind, model, **options)
    tensors = _train(model, optimizer, 1.0, shard=shard)
    assert all(hasattr(state["exp_avg"], "full_tensor") for state in optimizer.state.values())
    return tensors


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_does_the_same(ranks):
    """Rows are dealt out unevenly, and (1, 4) has none for a second rank."""
    model = _model()
    expected = _train(model, _optimizer(torch.optim.AdamW, model), 1.0)
    for found in run_ranks(_streamed_on_ranks, ranks):
        _assert_equal_but_for_rounding(found, expected)


def _streamed_on_ranks() -> list[torch.Tensor]:
    return _sharded(AdamWStreamed, device=CPU)


def _kinds(state: dict[str, torch.Tensor]) -> dict:
    return {key: (value.dtype, value.shape) for key, value in state.items()}


@pytest.mark.parametrize("before", [AdamWStreamed, AdamWOnRows])
def test_it_goes_on_with_saved_states_its_own_and_those_of_the_cpus_step(before, small_pieces):
    """They have the same keys, dtypes and numbers."""
    device = {"device": CPU} if before is AdamWStreamed else {}
    through = _model()
    expected = _train(through, _optimizer(AdamWStreamed, through, device=CPU), 1.0)

    first = _model()
    optimizer = _optimizer(before, first, **device)
    _train(first, optimizer, 1.0, range(2))
    second = copy.deepcopy(first)
    resumed = _optimizer(AdamWStreamed, second, device=CPU)
    resumed.load_state_dict(optimizer.state_dict())
    found = _train(second, resumed, 1.0, range(2, 4))
    _assert_equal_but_for_rounding(found[2:], expected[4:])  # norms apart
    for was, now in zip(first, second, strict=True):
        assert _kinds(resumed.state.get(now, {})) == _kinds(optimizer.state.get(was, {}))
    assert resumed.param_groups[0].keys() == torch.optim.AdamW(second).param_groups[0].keys()


def test_moments_are_page_locked_once_when_they_are_made_and_when_they_are_loaded(monkeypatch):
    locked = []

    def lock(moment, device):
        locked.append(moment)
        return moment.clone()  # as a small one

    monkeypatch.setattr(adamw_streamed, "page_locked", lock)
    model = _model()
    optimizer = _optimizer(AdamWStreamed, model, device=CPU)
    _train(model, optimizer, 1.0, range(1))
    assert len(locked) == 2 * (len(SIZES) - 2)
    _train(model, optimizer, 1.0, range(1, 4))
    assert len(locked) == 2 * (len(SIZES) - 1)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    _train(model, optimizer, 1.0, range(4, 5))
    assert len(locked) == 4 * (len(SIZES) - 1)


STEPS, SAVED = 4, 2


def _train_streamed(run) -> None:
    """As on a GPU; several pieces a step."""
    Run.streams_adamw = property(lambda run: True)
    adamw_streamed.FLOAT_PIECE = 2**9
    steps = []

    class Counted(AdamWStreamed):
        def _step_piece(self, *args):
            steps.append(args)
            super()._step_piece(*args)

    arguments.AdamWStreamed = Counted
    train_here(run)
    assert len(steps) > 2 * STEPS or run.resume


def _curve(run, key: str) -> list[float]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if "loss" in line]


def _resumed(run, folder):
    """A copy of a finished run as if it had been killed after its first checkpoint."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}"))
    shutil.rmtree(folder / run.result_folder.name)
    return run.model_copy(update={"output_dir": str(folder), "resume": True})


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_trains_and_resumes_as_with_the_cpus_step(method, tiny_base, make_run, tmp_path):
    training = {
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "learning_rate": 1e-3, "weight_decay": 0.1,
        "max_grad_norm": 0.5, "warmup_steps": 2,
    }  # fmt: skip
    options = {"processes": 2, "batch": 4, "training": training, "offload_params": True}
    plain, streamed = (make_run(tiny_base, tmp_path / name, method, **options) for name in ("plain", "streamed"))
    assert not plain.streams_adamw, "on the CPU nothing travels"
    run_ranks(train_here, 2, plain)
    run_ranks(_train_streamed, 2, streamed)
    assert min(_curve(plain, "grad_norm")) > training["max_grad_norm"], "nothing is clipped"
    additions = additions_to_a_step(plain)
    for key in ("loss", "grad_norm"):
        assert_curve_equal_but_for_rounding(_curve(streamed, key), _curve(plain, key), additions, of=key)

    again, older = _resumed(streamed, tmp_path / "again"), _resumed(plain, tmp_path / "older")
    alone = make_run(tiny_base, tmp_path / "streamed", method, **(options | {"processes": 1}))
    alone = _resumed(alone, tmp_path / "alone")
    run_ranks(_train_streamed, 2, again)
    assert _curve(again, "loss") == _curve(streamed, "loss")
    for file in streamed.result_folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(load_file(again.result_folder / file.name)[name], tensor), name
    run_ranks(_train_streamed, 1, alone)
    assert_curve_equal_but_for_rounding(_curve(alone, "loss"), _curve(streamed, "loss"), additions, of="loss")
    run_ranks(_train_streamed, 2, older)
    assert_curve_equal_but_for_rounding(_curve(older, "loss"), _curve(plain, "loss"), additions, of="loss")
