"""What a rank's memory grows by while it saves: a tensor on its way, not the model."""

import pytest
import torch
from ranks import memory_mib, run_ranks, sharded_model

from fitune.config.model_shapes import find_shape
from fitune.planning.memory import checkpoint_copy
from fitune.planning.plan import setup_of
from fitune.training.result import save_result
from fitune.training.state import training_state, write_training_state


def _growths(warm_up, run, folder) -> list[float]:
    """MiB that saving the training state and the result of a trained `run` add, each at its peak."""
    _save(*_trained(warm_up), warm_up, folder / "warm")
    return _save(*_trained(run), run, folder / "measured")


def _trained(run):
    model, tokenizer = sharded_model(run)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        moments = {name: torch.ones_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = moments | {"step": torch.tensor(1.0)}
    return model, tokenizer, optimizer


def _save(model, tokenizer, optimizer, run, folder) -> list[float]:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    saves = (
        lambda: write_training_state(folder, training_state(model, optimizer, world_size, weights=True), rank),
        lambda: save_result(folder / "model", run, model, tokenizer, None),
    )
    growths = []
    for save in saves:
        before = memory_mib("VmRSS", forget_peak=True)
        save()
        growths.append(memory_mib("VmHWM") - before)
    return growths


@pytest.mark.parametrize("world_size", [1, 2])
def test_saving_a_whole_model_takes_a_tensor_at_a_time(world_size, larger_base, uneven_base, make_run, tmp_path):
    """Its largest tensor has 16 MiB, all 236, the optimizer's state twice that. Gathered whole: 120 MiB and more."""
    warm_up, run = (make_run(base, tmp_path, "full", processes=world_size) for base in (uneven_base, larger_base))
    for state, result in run_ranks(_growths, world_size, warm_up, run, tmp_path):
        assert state < 24 and result < 100, (state, result)


def _copied_bytes(run) -> int:
    """What a rank's copy of a checkpoint takes; an adapter's weights, which rank 0 gathers, are in none of them."""
    model, _ = sharded_model(run)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = training_state(model, optimizer, torch.distributed.get_world_size(), weights=run.recipe.method == "full")
    copy = state.copied()
    assert all(torch.equal(copy.tensors[name], tensor) for name, tensor in state.tensors.items())
    return sum(tensor.nbytes for tensor in copy.tensors.values())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_plan_knows_what_a_copy_takes(method, tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path, method, processes=2, training={"save_strategy": "steps"})
    setup = setup_of(run, find_shape(str(tiny_base)))
    gathered = setup.trainable * setup.trained if method == "lora" else 0
    copied = sum(run_ranks(_copied_bytes, 2, run)) + gathered
    assert copied == pytest.approx(checkpoint_copy(setup), rel=0.01)  # a step count beside each tensor
