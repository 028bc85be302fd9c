"""A step whose gradient is not finite never reaches the weights."""

import pytest
import torch
from ranks import run_ranks, train_here

from fitune.errors import FituneError


def poisoned(run) -> str:
    """Trains with a loss that turns to NaN on the last rank in the third step; the error that ended it."""
    import torch.distributed as dist

    from fitune.trainer import ShardedSFTTrainer

    compute_loss = ShardedSFTTrainer.compute_loss

    def poison(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        bad = self.state.global_step == 2 and dist.get_rank() == dist.get_world_size() - 1
        return loss * torch.nan if bad else loss

    ShardedSFTTrainer.compute_loss = poison
    with pytest.raises(FituneError) as caught:
        train_here(run)
    return str(caught.value)


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_all_ranks_stop_before_the_optimizer_step(method, make_run, tiny_base, tmp_path):
    training = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    run = make_run(tiny_base, tmp_path, method, processes=2, batch=2, training=training)
    messages = run_ranks(poisoned, 2, run)
    assert messages[0] == messages[1]
    assert messages[0].startswith("step 3: the gradient's norm is nan, loss is not finite on rank 1;")
    checkpoints = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-1", "checkpoint-2"], "no checkpoint of the bad step"
    assert not run.result_folder.exists()
