"""Gradients of a step's only pass stay in bf16 where float32 weights are computed with in bf16: the same training."""

import pytest
import torch
from ranks import run_ranks, train_here
from safetensors.torch import load_file

from fitune.planning.sizes import Setup
from fitune.training.trainer import ShardedSFTTrainer

TRAINING = {"max_steps": 3, "learning_rate": 5e-3, "max_grad_norm": 1e9, "save_strategy": "steps", "save_steps": 3}
"Nothing is clipped: the norm of the same numbers adds up in another order in another dtype."


def _train(run, cast: bool) -> set[torch.dtype]:
    """Of the gradients that the optimizer is given. `cast`: they are cast whatever the plan says."""
    if cast:
        Setup.uncast_gradients = False
    found, norm = set(), ShardedSFTTrainer._get_grad_norm

    def seen(trainer, model, *args, **kwargs):
        found.update(parameter.grad.dtype for parameter in model.parameters())
        return norm(trainer, model, *args, **kwargs)

    ShardedSFTTrainer._get_grad_norm = seen
    train_here(run)
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_training_is_the_same_to_the_bit(processes, uneven_base, make_run, tmp_path):
    """Weights, moments and losses, of ranks with parts of unlike sizes."""
    made = []
    for name, cast in (("bf16", False), ("float32", True)):
        options = {
            "processes": processes,
            "mixed_precision": "bf16",
            "training": TRAINING,
            "batch": 2,
            "micro_batch": 2 // processes,
        }
        run = make_run(uneven_base, tmp_path / name, "full", **options)
        [dtypes] = {frozenset(found) for found in run_ranks(_train, processes, run, cast)}
        assert dtypes == {torch.float32 if cast else torch.bfloat16}
        files = sorted(run.folder.rglob("*.safetensors"))
        made.append({str(file.relative_to(run.folder)): load_file(file) for file in files})
    uncast, expected = made
    assert uncast.keys() == expected.keys() and len(expected) == 1 + processes
    for file, tensors in expected.items():
        assert any("exp_avg" in name for name in tensors) == ("state" in file)
        for name, tensor in tensors.items():
            assert torch.equal(uncast[file][name], tensor), (file, name)


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 4},
        {"training": TRAINING | {"optim": "adamw_torch"}},
        {"training": TRAINING | {"optim": "rmsprop"}},
        {"processes": 2, "reduce_dtype": "fp32"},
        {"processes": 2, "replicas": 2},
        {"offload_params": True},
        {"mixed_precision": "no"},
    ],
    ids=str,
)
def test_others_are_float32(options, uneven_base, make_run, tmp_path):
    """Passes and ranks add up in it, and torch's optimizers take no other."""
    options = {"mixed_precision": "bf16", "training": TRAINING, "batch": 2} | options
    run = make_run(uneven_base, tmp_path, "full", **options)
    for found in run_ranks(_train, run.accelerate.num_processes, run, False):
        assert found == {torch.float32}
