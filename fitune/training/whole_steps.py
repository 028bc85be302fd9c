"""Global batches that the ranks' passes don't divide: each step is filled up with rows that have no labels.

Three ranks take the 8 rows of a step in three passes of one row each: the ninth place gets a filler row, which counts
nothing. So a step has the same rows, and the same loss, on any number of ranks.
"""

from collections.abc import Iterator

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler, SequentialSampler

from fitune.config.schema import Run
from fitune.data.dataset import FILLER_TOKENS
from fitune.data.token_file import IGNORED


def rows_per_step(run: Run) -> int:
    """Places for rows in all passes of all ranks of one optimizer step: the global batch, or a few more."""
    return run.profile.micro_batch * run.accelerate.num_processes * run.gradient_accumulation_steps


def in_whole_steps(rows: Sampler, run: Run) -> Sampler:
    """An epoch's order in which each global batch is followed by the filler rows of its step.

    `rows` is Trainer's sampler over real rows that fill their last global batch, and one filler row after them where a
    step needs some.
    """
    batch, places = run.recipe.global_batch_size, rows_per_step(run)
    return rows if places == batch else WholeSteps(rows, batch, places)


class WholeSteps(Sampler):
    """Indices of an epoch in the order of `rows`; the last row of its data is the filler row."""

    def __init__(self, rows: RandomSampler | SequentialSampler, batch: int, places: int):
        self.filler = len(rows.data_source) - 1
        real = range(self.filler)
        # accelerate makes the same of a RandomSampler that is not wrapped: the order is that of a batch without fillers
        self.rows = SeedableRandomSampler(real) if isinstance(rows, RandomSampler) else SequentialSampler(real)
        self.batch, self.places = batch, places

    def __len__(self) -> int:
        return len(self.rows) // self.batch * self.places

    def __iter__(self) -> Iterator[int]:
        fillers = [self.filler] * (self.places - self.batch)
        for place, index in enumerate(self.rows, start=1):
            yield index
            if place % self.batch == 0:
                yield from fillers

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.rows, SeedableRandomSampler):
            self.rows.set_epoch(epoch)


def count_tokens(batch: dict[str, torch.Tensor], labels: torch.Tensor) -> int:
    """Of all examples but filler rows, pads left out. On the CPU, where `labels` are: `find_answers` says why."""
    is_answer = (labels != IGNORED).long()
    if "attention_mask" in batch:
        lengths, answers = batch["attention_mask"].cpu().sum(1), is_answer.sum(1)
    else:  # examples side by side in one row
        bounds = batch["cu_seq_lens_q"].cpu().long()
        answers_before = torch.nn.functional.pad(is_answer.flatten().cumsum(0), (1, 0))
        lengths, answers = bounds.diff(), answers_before[bounds].diff()
    is_filler = (lengths == FILLER_TOKENS) & (answers == 0)
    return int(lengths.masked_fill(is_filler, 0).sum())
