"""Which rows of train.jsonl a training batch was made of: read back from its tokens, when a step went wrong."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

MOST = 8
"Rows that are named."


def name_rows(batches: list[dict[str, torch.Tensor]], tokenizer: PreTrainedTokenizerBase, train_file: Path) -> str:
    """`FILE:LINE, FILE:LINE` of the examples in `batches`, as many as there is room for.

    `batches` hold `input_ids` [rows, T] with an `attention_mask`, or [1, T] of packed examples with `position_ids`.
    """
    wanted = [tokenizer.decode(ids) for batch in batches for ids in _examples(batch)]
    found = []
    with train_file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            tools = json.loads(row["tools"]) if row.get("tools") else None
            rendered = tokenizer.apply_chat_template(row["messages"], tools=tools, tokenize=False)
            if any(rendered.startswith(text) for text in wanted):
                found.append(f"{train_file}:{number}")
    more = f" and {len(found) - MOST} more" if len(found) > MOST else ""
    return ", ".join(found[:MOST]) + more


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
