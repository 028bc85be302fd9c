"""What a rank's memory grows by while it saves: a tensor on its way, not the model."""

import pytest
import torch
from ranks import memory_mib, run_ranks, sharded_model

from fitune.training.result import save_result
from fitune.training.state import save_training_state


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
        lambda: save_training_state(folder, model, optimizer, rank, world_size),
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
