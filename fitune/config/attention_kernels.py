"""Which attention kernel long examples get: for the layer, which calls it, and for `plan`, which times it."""

CUDNN_CAPABILITIES = frozenset({9.0, 10.0, 10.3})
"""Hopper and Blackwell's data centre GPUs, by compute capability: PyTorch itself prefers cuDNN's attention there."""
CUDNN_FROM = 2048
"""Tokens of an example. On an H200 cuDNN took 0.61 of FlashAttention's time for 4 rows of 3072, forward and backward,
0.59 for one of 32,768, 0.86 for 2 of 3,000, which are padded, and 1.2 for one of 1,024."""
