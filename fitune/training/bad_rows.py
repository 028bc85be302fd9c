"""A step that went wrong is refused, and the rows of train.jsonl it was made of are named: found by their tokens."""

import math
from pathlib import Path

import numpy as np
import torch

from fitune.data.token_file import IGNORED, TokenFile
from fitune.errors import FituneError
from fitune.training.distributed import from_all_ranks

MOST = 8
"Rows that are named."


def refuse_step(
    step: int, norm: float, batches: list[tuple[dict, torch.Tensor]], tokens: TokenFile, train_file: Path
) -> None:
    """Raises FituneError on all ranks, naming those with a bad loss and the rows; no weight has changed yet.

    `norm` of the whole gradient, `batches`: this rank's micro batches with their losses. Call on all ranks.
    """
    bad = [inputs for inputs, loss in batches if not math.isfinite(loss)]
    rows = name_rows(bad or [inputs for inputs, _ in batches], tokens, train_file)
    finite = [inputs for inputs, loss in batches if math.isfinite(loss) and (inputs["labels"] != IGNORED).any()]
    ranks = from_all_ranks((bool(bad), rows, not finite))
    if any(is_bad for is_bad, _, _ in ranks):
        named = [f"loss is not finite on rank {rank}: {rows}" for rank, (is_bad, rows, _) in enumerate(ranks) if is_bad]
        where = "; ".join(named)
    else:
        where = "all losses are finite: " + ", ".join(rows for _, rows, _ in ranks)
    what = "look at these rows, or resume from the last checkpoint with a lower learning rate"
    if step == 1 and all(all_are for _, _, all_are in ranks):
        what = "no row has a finite loss, so look at the base: its weights may not be finite"
    raise FituneError(
        f"step {step}: the gradient's norm is {norm}; {where}; stopped before the weights changed: {what}"
    )


def name_rows(batches: list[dict[str, torch.Tensor]], tokens: TokenFile, train_file: Path) -> str:
    """`FILE:LINE, FILE:LINE` of the examples in `batches`, as many as there is room for.

    `batches` hold `input_ids` [rows, T] with an `attention_mask`, or [1, T] of packed examples with `position_ids`.
    """
    wanted = [ids.numpy() for batch in batches for ids in _examples(batch)]
    is_text = tokens.is_text()
    found = [
        f"{train_file}:{row + 1}"
        for row in range(len(tokens))
        if any(_holds(tokens.ids(row), example, is_text[row]) for example in wanted)
    ]
    more = f" and {len(found) - MOST} more" if len(found) > MOST else ""
    return ", ".join(found[:MOST]) + more


def _holds(ids: np.ndarray, example: np.ndarray, is_text: bool) -> bool:
    """Whether a row begins with an example, which was cut if the row is longer; of a text it may be any piece."""
    if is_text:
        return any((piece == example).all() for piece in _pieces(ids, len(example), example[0]))
    return len(example) <= len(ids) and bool((ids[: len(example)] == example).all())


def _pieces(ids: np.ndarray, length: int, first: int):
    """Every stretch of `length` tokens that begins with the token `first`."""
    for start in np.flatnonzero(ids[: max(0, len(ids) - length + 1)] == first):
        yield ids[start : start + length]


def _examples(batch: dict[str, torch.Tensor]):
    """Token ids of each example."""
    ids = batch["input_ids"].cpu()
    if "position_ids" in batch:
        starts = (batch["position_ids"][0].cpu() == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            yield ids[0, start:stop]
    else:
        for row, mask in zip(ids, batch["attention_mask"].cpu().bool(), strict=True):
            yield row[mask]
