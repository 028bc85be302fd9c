"""What `plan` says that ranks gather, and that travels from host RAM, beside what FSDP is asked for in real steps."""

from dataclasses import replace

import pytest
from bases import base_like
from ranks import run_ranks, train_here
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from fitune.config.model_shapes import find_shape
from fitune.model import one_rank
from fitune.planning import step_time
from fitune.planning.plan import setup_to_train
from fitune.training.trainer import ShardedSFTTrainer

BF16 = 2
STEPS = 2


def _bytes_of_passes(run, module, name, size_of) -> list[int]:
    """What calls of `module.name` have moved in each forward and backward pass."""
    moved, passes = [0], []
    original, training_step = getattr(module, name), ShardedSFTTrainer.training_step

    def counting(parameters, *args, **kwargs):
        moved[0] += sum(map(size_of, parameters))
        return original(parameters, *args, **kwargs)

    def one_pass(*args, **kwargs):
        moved[0] = 0
        loss = training_step(*args, **kwargs)
        passes.append(moved[0])
        return loss

    setattr(module, name, counting)
    ShardedSFTTrainer.training_step = one_pass
    train_here(run)
    return passes


def gathered(run) -> list[int]:
    """Of all ranks' rows."""
    return _bytes_of_passes(
        run, _fsdp_param_group, "foreach_all_gather", lambda kept: kept.sharded_param.numel() * BF16
    )


def from_host_ram(run) -> list[int]:
    return _bytes_of_passes(run, one_rank, "_copy", lambda kept: kept._sharded_param_data.nbytes)


def _planned_and_run(tied, uneven_base, make_run, tmp_path, **options):
    base = base_like(uneven_base, tmp_path / "base", tie_word_embeddings=tied, vocab_size=2048)
    training = {"max_steps": STEPS, "learning_rate": 1e-3}
    run = make_run(base, tmp_path / "run", "full", mixed_precision="bf16", training=training, **options)
    return replace(setup_to_train(run, find_shape(str(base))), compute=BF16), run


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("reshard", "passes"), [(True, 1), (False, 2)])
def test_weights_are_gathered_as_often_as_planned(reshard, passes, tied, uneven_base, make_run, tmp_path):
    """Embedding and head that are one tensor are gathered as one."""
    options = {"processes": 2, "batch": 2 * passes, "reshard_after_forward": reshard}
    setup, run = _planned_and_run(tied, uneven_base, make_run, tmp_path, **options)
    of_passes, of_the_other = run_ranks(gathered, 2, run)
    assert of_passes == of_the_other
    assert step_time._gathered_bytes(setup) * passes == pytest.approx(sum(of_passes[-passes:]), rel=1e-3)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_travel_from_host_ram_as_often_as_planned(tied, uneven_base, make_run, tmp_path):
    setup, run = _planned_and_run(tied, uneven_base, make_run, tmp_path, batch=2, offload_params=True)
    [passes] = run_ranks(from_host_ram, 1, run)
    both_ways = sum(step_time._host_bytes(setup)) - setup.gradients * step_time._gradients_travel(setup)
    assert both_ways == pytest.approx(passes[-1], rel=1e-3)
