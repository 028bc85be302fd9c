"""The next step's batches are read ahead: in the same order, no further than the epoch and the run go."""

import torch
from ranks import run_ranks, train_here

from fitune.training.read_ahead import ReadAhead
from fitune.training.trainer import ShardedSFTTrainer


def _rows_of_steps(run, ahead: bool) -> tuple[list[tuple], list[str]]:
    """(each pass's step and tokens, "norm" and "read" in the order they came)"""
    passes, order = [], []
    step, norm, read = (
        getattr(ShardedSFTTrainer, name) for name in ("training_step", "_get_grad_norm", "_read_batches")
    )

    def training_step(self, model, inputs, *args, **kwargs):
        passes.append((self.state.global_step, inputs["input_ids"].flatten().tolist()))
        return step(self, model, inputs, *args, **kwargs)

    def get_grad_norm(self, *args, **kwargs):
        found = norm(self, *args, **kwargs)
        order.append("norm")
        return found

    def read_batches(self, *args):
        order.append("read")
        return read(self, *args)

    ShardedSFTTrainer.training_step, ShardedSFTTrainer._get_grad_norm = training_step, get_grad_norm
    ShardedSFTTrainer._read_batches = read_batches
    if not ahead:
        ShardedSFTTrainer._read_next_batches = lambda self: None
    train_here(run)
    return passes, order


def test_the_same_rows_in_the_same_order(make_run, tiny_base, tmp_path):
    """Over two epochs and a part, with evaluation between the steps."""
    training = {"num_train_epochs": 2.5, "max_steps": -1, "eval_strategy": "steps", "eval_steps": 2}
    found = []
    for ahead in (True, False):
        run = make_run(tiny_base, tmp_path / str(ahead), "lora", batch=4, micro_batch=2, training=training)
        [result] = run_ranks(_rows_of_steps, 1, run, ahead)
        found.append(result)
    (passes, order), (expected, one_by_one) = found
    assert passes == expected
    steps = 1 + passes[-1][0]
    assert one_by_one == ["read", "norm"] * steps
    an_epoch = int(steps / 2.5)
    expected = []
    for in_epoch in (an_epoch, an_epoch, steps - 2 * an_epoch):
        expected += ["read", *["read", "norm"] * (in_epoch - 1), "norm"]
    assert order == expected


def test_another_epoch_begins_with_its_own_batches():
    epochs = iter("ab"), iter("cd")
    ahead = ReadAhead(lambda batches, number, device: [next(batches) for _ in range(number)])
    threads = torch.get_num_threads()
    assert ahead.take(epochs[0], 1, None) == ["a"]
    ahead.read_next()
    ahead.read_next()
    assert ahead.take(epochs[0], 1, None) == ["b"]
    assert ahead.take(epochs[1], 2, None) == ["c", "d"]
    assert torch.get_num_threads() == threads
