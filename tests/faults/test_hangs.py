"""A rank that hangs is named and ends the run; one that is slow, or waits for a slow one, does not."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from commands import Running, changed, start_on_two_machines, train_command

HANG = """
def change(rank):
    from fitune.weights.safetensors_files import CheckpointWriter
    from fitune.weights.load import _Loader
    from fitune.model.layer import DecoderLayer

    turns = []
    def evaluates_again(layer, _):  # the first evaluation may take minutes
        if turns[-1:] != [layer.training]:
            turns.append(layer.training)
        return turns == [True, False, True, False]

    owner, method, now = {where}
    original, calls = getattr(owner, method), itertools.count()
    def sleepy(self, *args, **kwargs):
        if rank == 1 and now(self, next(calls)):
            time.sleep(3600)
        return original(self, *args, **kwargs)
    setattr(owner, method, sleepy)
"""
"Rank 1 stands still, but is not stopped, where the test says."
SLOW_STEPS = """
def change(rank):
    import torch
    from fitune.model.layer import DecoderLayer

    forward, step, steps = DecoderLayer.forward, torch.optim.AdamW.step, itertools.count()
    def slow_forward(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if output.requires_grad:
            output.register_hook(lambda _: time.sleep(4))
        return output
    def slow_step(self, *args, **kwargs):
        if next(steps):
            time.sleep(8 * rank)
        else:  # the first step may take long anyhow
            DecoderLayer.forward = slow_forward
        return step(self, *args, **kwargs)
    torch.optim.AdamW.step = slow_step
"""
"A backward pass takes longer than a layer may, and so does the optimizer's step on one rank alone."
SLOW_SAVE = """
def change(rank):
    from fitune import output_folder

    rename = output_folder.rename_when_whole
    def slow_rename(partial, *args, **kwargs):
        for number in range(7 * (rank == 0)):
            (partial.parent / "slow").write_bytes(bytes(2**20))
            time.sleep(1)
        return rename(partial, *args, **kwargs)
    output_folder.rename_when_whole = slow_rename
"""
"Rank 0 writes for longer than a rank may stand still."


@pytest.mark.parametrize(
    "where",
    [
        pytest.param('_Loader, "fill", lambda _, calls: calls == 5', id="reading the first weights"),
        pytest.param('_Loader, "fill", lambda _, calls: calls == 20', id="reading later weights"),
        pytest.param('DecoderLayer, "forward", lambda _, calls: calls == 9', id="in a later step"),
        pytest.param('DecoderLayer, "forward", evaluates_again', id="evaluating"),
        pytest.param('CheckpointWriter, "write", lambda _, calls: calls == 3', id="saving"),
    ],
)
def test_a_rank_that_hangs_is_named(where, tiny_base, prepared, tmp_path):
    environment = changed(HANG.replace("{where}", where), tmp_path) | {"FITUNE_HUNG_AFTER_SECONDS": "6"}
    evaluation = {"training.eval_strategy": "steps", "training.eval_steps": 2}
    command = train_command(tiny_base, prepared, tmp_path / "run", 12, **evaluation)
    running = Running(command, tmp_path / "log", **environment)
    assert running.wait() == 1
    text = running.log.read_text()
    assert re.search(r"error: rank 1 \(pid \d+ on \S+\): no progress for 6 s; all ranks were ended", text), text[-2000:]


def test_slow_steps_are_no_hang(tiny_base, prepared, tmp_path):
    environment = changed(SLOW_STEPS, tmp_path) | {"FITUNE_HUNG_AFTER_SECONDS": "6"}
    running = Running(train_command(tiny_base, prepared, tmp_path / "run", 2), tmp_path / "log", **environment)
    assert running.wait() == 0, running.log.read_text()[-2000:]


def test_a_machine_that_waits_for_another_ones_disk_is_no_hang(tiny_base, prepared, tmp_path):
    environment = changed(SLOW_SAVE, tmp_path) | {"FITUNE_HUNG_AFTER_SECONDS": "4"}
    command = train_command(tiny_base, prepared, tmp_path / "run", 1)
    for machine in start_on_two_machines(command, tmp_path, **environment):
        assert machine.wait() == 0, machine.log.read_text()[-3000:]
