"""Global batches that the ranks' passes don't divide: a step has the same rows, so the same loss, on any ranks."""

import json
import shutil

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from ranks import run_alone, run_ranks, train_here
from rounding import additions_to_a_step, assert_curve_equal_but_for_rounding
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from fitune.training.whole_steps import WholeSteps, in_whole_steps

STEPS, SAVED, BATCH = 8, 7, 10  # 48 rows: five steps an epoch, the fifth with 8 rows
TRAINING = {"max_steps": STEPS, "learning_rate": 5e-3, "save_strategy": "steps", "save_steps": SAVED}


def order_of_two_epochs() -> tuple[list[list[int]], list[list[int]]]:
    """The rows of two epochs as accelerate shuffles them, and as they are in whole steps of 4 rows in 6 places."""
    config = DataLoaderConfiguration(use_seedable_sampler=True)  # as Trainer has it
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    torch.manual_seed(3)
    rows = torch.arange(13)  # 12 and the filler
    plain = accelerator.prepare(DataLoader(rows[:12], sampler=RandomSampler(rows[:12])))
    filled = accelerator.prepare(DataLoader(rows, sampler=WholeSteps(RandomSampler(rows), 4, 6)))
    return tuple([[int(row) for row in loader] for _ in range(2)] for loader in (plain, filled))


def test_the_order_is_that_of_a_batch_without_fillers():
    plain, filled = run_alone(order_of_two_epochs)
    assert plain[0] != plain[1]
    for as_usual, in_steps in zip(plain, filled, strict=True):
        assert [row for row in in_steps if row != 12] == as_usual
        assert [place for place, row in enumerate(in_steps) if row == 12] == [4, 5, 10, 11, 16, 17]


def test_nothing_changes_where_the_passes_divide_the_batch(make_run, tiny_base, tmp_path):
    rows = SequentialSampler(range(12))
    assert in_whole_steps(rows, make_run(tiny_base, tmp_path, processes=2, micro_batch=2, batch=4)) is rows


def _curve(run) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    keys = ("epoch", "loss", "grad_norm", "mean_token_accuracy", "num_tokens")
    return {key: [line[key] for line in steps] for key in keys}


def test_three_ranks_have_the_losses_of_one(make_run, tiny_base, tmp_path):
    """Into the second epoch, with dropout; its checkpoint then goes on on two ranks, three rows each."""
    options = {"batch": BATCH, "training": TRAINING, "lora": {"dropout": 0.2}}
    one = make_run(tiny_base, tmp_path / "one", "lora", micro_batch=BATCH, **options)
    three = make_run(tiny_base, tmp_path / "three", "lora", processes=3, **options)
    assert three.gradient_accumulation_steps == 4  # 12 places for 10 rows
    run_ranks(train_here, 1, one)
    run_ranks(train_here, 3, three)
    shutil.copytree(three.folder, tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / f"checkpoint-{STEPS}")
    two = make_run(tiny_base, tmp_path / "two", "lora", processes=2, micro_batch=3, **options)
    run_ranks(train_here, 2, two.model_copy(update={"resume": True}))
    expected, additions = _curve(one), additions_to_a_step(one)
    for run in (three, two):
        found = _curve(run)
        assert (found["epoch"], found["num_tokens"]) == (expected["epoch"], expected["num_tokens"])
        for key in ("loss", "grad_norm"):
            assert_curve_equal_but_for_rounding(found[key], expected[key], additions, of=(run.folder.name, key))
