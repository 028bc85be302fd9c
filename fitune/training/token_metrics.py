"""Loss, perplexity and accuracy over answer tokens: what `eval` reports and what training logs as it evaluates."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


@torch.no_grad()
def token_metrics(model: nn.Module, batches: Iterable[dict], on_pass=lambda: None) -> dict[str, float]:
    """Mean loss (nats), perplexity and accuracy over the answer tokens of all ranks' batches, each token counted once.

    So it is the same however rows are packed, batched and dealt out. Call on all ranks, each with as many batches: they
    gather each layer together. Rows that only fill up a batch must have no labels. `on_pass` is called after each.
    """
    model.eval()
    sums = []  # of each pass: log-likelihood, right tokens, tokens
    for batch in batches:
        output = model(**batch, use_cache=False, fused_lm_head=True)
        of_tokens = (output.log_probs, output.is_top1, output.label_mask)
        sums.append(torch.stack([values.sum(dtype=torch.float64) for values in of_tokens]))
        on_pass()
    totals = torch.stack(sums).sum(0).cpu()
    dist.all_reduce(totals)
    log_likelihood, right, tokens = totals.tolist()
    loss = -log_likelihood / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "token_accuracy": right / tokens,
        "tokens": int(tokens),
    }
