"""Stand-ins on the CPU for the GPU's attention kernels, so that what calls them is tested where there is no GPU.

They are registered for the operators themselves: a call with a wrong argument fails here as it does on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch.nn import functional as F


@contextmanager
def kernels_on_the_cpu() -> Iterator[list[str]]:
    """The kernels compute on the CPU inside; the list holds the name of each call."""
    calls: list[str] = []
    library = torch.library.Library("aten", "IMPL")
    for kernel in (
        _scaled_dot_product_cudnn_attention,
        _scaled_dot_product_cudnn_attention_backward,
        _flash_attention_forward,
        _flash_attention_backward,
    ):
        library.impl(kernel.__name__, _noted(kernel, calls), "CPU")
    try:
        yield calls
    finally:
        library._destroy()


def _noted(kernel, calls: list[str]):
    def noted(*args, **kwargs):
        calls.append(kernel.__name__)
        return kernel(*args, **kwargs)

    return noted


def _scaled_dot_product_cudnn_attention(
    query,
    key,
    value,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    assert attn_bias is None and compute_log_sumexp and not return_debug_mask and not dropout_p
    assert query.shape[2] % 256 == 0, "cuDNN plans each new length"
    output = _causal(query, key, value, is_causal, scale)
    nothing, number = torch.empty(0), torch.zeros((), dtype=torch.int64)
    log_sums = torch.zeros(*query.shape[:3], 1)
    return output, log_sums, nothing, nothing, query.shape[2], key.shape[2], number, number, nothing


def _scaled_dot_product_cudnn_attention_backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k,
    max_q, max_k, dropout_p, is_causal, *, scale=None,
):  # fmt: skip
    assert (max_q, max_k) == (query.shape[2], key.shape[2]) and logsumexp.shape[:3] == query.shape[:3]
    return _causal_backward(grad_out, query, key, value, out, is_causal, scale)


def _flash_attention_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, **rest,
):  # fmt: skip
    _check_packing(query, cum_seq_q, cum_seq_k, max_q, max_k)
    assert not dropout_p and not return_debug_mask
    causal = is_causal or (window_size_left, window_size_right) == (-1, 0)
    output = _by_example(query, key, value, cum_seq_q, causal, scale)
    nothing = torch.empty(0)
    return output, torch.zeros(query.shape[1], query.shape[0]), torch.zeros(2, dtype=torch.uint64), nothing, nothing


def _flash_attention_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    _check_packing(query, cum_seq_q, cum_seq_k, max_q, max_k)
    assert logsumexp.shape == (query.shape[1], query.shape[0]) and rng_state.dtype == torch.uint64
    causal = is_causal or (window_size_left, window_size_right) == (-1, 0)
    examples = []
    for start, stop in pairwise(cum_seq_q.tolist()):
        one = (x[start:stop].transpose(0, 1) for x in (grad_out, query, key, value, out))
        examples.append([x.transpose(0, 1) for x in _causal_backward(*one, causal, scale)])
    return tuple(torch.cat(parts) for parts in zip(*examples, strict=True))


def _check_packing(query, cum_seq_q, cum_seq_k, max_q, max_k):
    assert torch.equal(cum_seq_q, cum_seq_k) and cum_seq_q.dtype == torch.int32
    assert max_q == max_k == cum_seq_q.diff().max() and cum_seq_q[-1] == len(query)


def _causal(query, key, value, is_causal, scale):
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=True)


def _by_example(query, key, value, bounds, is_causal, scale):
    parts = [
        _causal(*(x[start:stop].transpose(0, 1) for x in (query, key, value)), is_causal, scale).transpose(0, 1)
        for start, stop in pairwise(bounds.tolist())
    ]
    return torch.cat(parts)


def _causal_backward(grad_out, query, key, value, out, is_causal, scale):
    """By hand: autograd is off inside a kernel."""
    shared = query.shape[-3] // key.shape[-3]
    keys, values = (x.repeat_interleave(shared, dim=-3) for x in (key, value))
    scores = scale * query @ keys.mT
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    weights = scores.softmax(-1)
    grad_scores = scale * weights * (grad_out @ values.mT - (grad_out * out).sum(-1, keepdim=True))
    grad_keys, grad_values = grad_scores.mT @ query, weights.mT @ grad_out
    heads = (-3, (key.shape[-3], shared))
    return grad_scores @ keys, grad_keys.unflatten(*heads).sum(-3), grad_values.unflatten(*heads).sum(-3)
