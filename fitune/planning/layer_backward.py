"""What one decoder layer holds at most while it goes backward: `fitune.model.layer_pass`, in bytes.

h, i and T as in `fitune.planning.sizes`. Checked against the model's own code on fake tensors (benchmarks/README.md).
"""

from fitune.config.tiles import MLP_TILE
from fitune.planning.sizes import FP8, FP32, Setup


def layer_backward(s: Setup, *, kept: bool = False) -> float:
    """The peak beside the layer's gathered weights and output gradient; what it saved, or computes again, included."""
    h, heads = s.hidden_state, s.query_heads + 2 * s.shared_heads
    saved = s.saved_by_layer - 2 * s.inner_state  # for attention, and the MLP's input
    # gradients of o, q, k and v, and what seems to be cuDNN's own room, four times q: longest-rows-*-80gb-*.json
    attention = heads + 5 * s.query_heads
    # heads that have norms of their own are there before and after them
    attention += 2 * (s.query_heads + s.shared_heads) * s.shape.head_norms
    gate_up = 2 * s.inner_state * kept  # of all tiles, to the end
    tile_i, _ = _tiles(s)
    other_tiles = max(0.0, gate_up - 2 * tile_i)
    if not s.full:  # the MLP's input and its gradient; then the gradient alone
        return saved + max(h + _mlp(s) + other_tiles, gate_up + attention)
    return saved + max(
        h + _trained_mlp(s) + other_tiles,
        3 * _down(s) + gate_up + attention,
        s.gathered_layer + gate_up + heads + 3 * h,  # the end: all gradients of weights
    )


def _mlp(s: Setup) -> float:
    """Gate and up, and what is computed from them, beside a frozen base."""
    i, h = _tiles(s)
    dequantised = _down(s) if s.method == "qlora" and not s.fp8 else 0.0
    inputs = 1 + s.lora_dropout  # an adapter reads a dropped-out copy, whose gradient is apart
    mlp = max(
        (3 + inputs) * i + h,  # gate, up, SwiGLU's product, its gradient, its copy's
        3 * i + dequantised + h,
    )
    if s.fp8:  # the gradients of gate and up, rounded; their weights; an adapter's input; the norm's gradient
        mlp = max(mlp, 2 * i + 2 * i * FP8 / s.compute + 2 * _down(s) * FP8 / s.compute + 2 * h)
    return mlp


def _trained_mlp(s: Setup) -> float:
    """The same beside the gradients of weights: in float32 where there is more than one tile."""
    i, h = _tiles(s)
    gradient, rounded = _down(s), FP8 / s.compute if s.fp8 else 0.0
    of_weights = gradient * (FP32 / s.compute if s.tokens > MLP_TILE else 1)
    return max(
        4 * i + h,  # gate, up, SwiGLU's product and its gradient; the norm
        3 * i + h + of_weights + (i + h) * rounded,  # down's gradient, of the product and dy, rounded
        2 * i + h + 3 * of_weights + (2 * i + h) * rounded,  # gate's and up's
        2 * i + 2 * h + 3 * of_weights + (2 * i + 2 * gradient) * rounded,  # that of the norm
    )


def _down(s: Setup) -> float:
    """One of the MLP's weights, as it computes."""
    rows, columns = s.shape.linears["down_proj"]
    return rows * columns * s.compute


def _tiles(s: Setup) -> tuple[float, float]:
    """Of the MLP's working memory: [tile's tokens, i] and [tile's tokens, h]."""
    share = min(s.tokens, MLP_TILE) / s.tokens
    return s.inner_state * share, s.hidden_state * share
