"""How long an optimizer step takes: a roofline of a run's sizes and of a GPU model's peak rates. An estimate.

benchmarks/README.md has it beside every run that was timed with a GPU for each rank.
"""

from fitune.config.attention_kernels import CUDNN_CAPABILITIES, CUDNN_FROM
from fitune.planning.gpu_models import GpuModel, refuse_missing_bf16
from fitune.planning.sizes import BF16, FP8, FP32, NF4, Setup

ADDING_UP = "adding up adapters"
"The part of a step in which copies of the model that are whole on each GPU exchange gradients."
COMPUTE_EFFICIENCY = 0.64
"""Of the data sheet's peak, in matrix products: benchmarks/results/peers-h200-2026-11-27.json."""
FP8_SPEEDUP, WIDE_FP8_SPEEDUP, WIDE = 1.65, 1.85, 8192
"""Of products in fp8 over bf16, as whole runs on H200s show it: 8B 1.56 to 1.75, peers-h200-2026-11-28d.json and the
two after it; 70B, whose hidden size is WIDE, 1.84 to 1.96. Bare products are twice as fast, but their inputs, gradients
and weights are rounded before, and that counts less where products are large."""
FLASH_EFFICIENCY = 0.30
"""The same of PyTorch's FlashAttention: 322 TFLOP/s forward, 264 backward on an H200, 2026-11-27."""
CUDNN_EFFICIENCY, CUDNN_LOST_TOKENS = 0.55, 1100
"""The same of cuDNN's attention for endless examples, and how many tokens' worth of it an example loses: 400 TFLOP/s
for 3,072 tokens (trace-8b-whole-card-h200-2026-11-27.json), 525 for 32,100 (peers-h200-2026-11-28.json)."""
SECONDS_PER_PASS = {"full": 0.0029, "lora": 0.0027, "qlora": 0.0027}
"""Launching one layer's kernels, forward or backward, by method. At most: 8B in passes of one row, all recomputed, took
2.11 s for 768, and mostly the GPU computed (peers-h200-2026-11-28d.json); 1B in full 0.83 s for 288
(full-small-models-h200-2026-11-28.json)."""
SHARDED_SECONDS_PER_PASS = {"full": 0.0029, "lora": 0.0043, "qlora": 0.0043}
"""What FSDP adds where ranks hold a copy between them: 8B LoRA with two rows a pass on four H200s took 0.52 s for 74
(tiers-h200x4-2026-11-27.json); in full on two H100s 0.71 s for 96, an optimizer step among them."""
TRAVELLING_SECONDS_PER_PASS = 0.0010
"""What FSDP adds where one rank has weights in host RAM. At most: 8B with two rows of 2,048 a pass and its embedding
there took 0.36 s for 94 (tiers-h200-2026-11-29.json)."""
BANDWIDTH_EFFICIENCY = 0.85
"""Of the data sheet's, for what a GPU's kernels read and write, and for links."""
BOTH_WAYS = 1.36
"""What a link carries in both directions together, of one direction: benchmarks/results/full-8b-cards-*.json."""
HOST_GB_S = 20
"""What clipping and an optimizer's step reach in a machine's RAM where weights are offloaded: AdamW took 13 s for 8B
while the CPU computed it."""
HOST_ADDING_GB_S = 1.2
"""Adding gradients to those that wait in host RAM, which FSDP copies there first: 27 s for 8B."""
COLLECTIVE_TRAFFIC = 4
"""Bytes of GPU memory that a collective reads and writes for each that a rank receives, with what it costs products to
share their processors with it: 13.7 s for 70B in full on four H200s, benchmarks/results/full-70b-4xh200-*.json."""
ADAMW_SHARE = 0.8
"""What AdamW in float32 reaches of a GPU's bandwidth, and clipping before it: 16 ms for 2.3 G elements on an H200, by
hand, and 4.6 ms for the norm of 4 G, benchmarks/results/busy-8b-full-2xh200-2026-11-29.json."""
SMALL_STEP_SHARE = 0.4
"""The same of small optimizer states: the step draws, and looks for codes, for each number. 6.2 ms for 1.2 G elements
on an H200, by hand."""
MACHINE_NETWORK_GB_S = 12.5
"""Between machines, all GPUs of a machine together, unless given: 100 Gbit/s."""


def step_seconds(s: Setup, model: GpuModel, network_gb_s: float | None = None) -> dict[str, float]:
    """Seconds by what they go to, and their total. Between machines, None is MACHINE_NETWORK_GB_S.

    Computing and the link to host RAM run side by side, forward and then backward: in each pass the slower one counts.
    The network runs beside both passes. Gradients that wait in host RAM while their optimizer's states do, too, travel
    there in what the backward pass leaves of the link. Raises UsageError for a model without products in bf16.
    """
    refuse_missing_bf16(model)
    network_gb_s = network_gb_s or MACHINE_NETWORK_GB_S
    link = model.host_link_gb_s * BANDWIDTH_EFFICIENCY * 1e9
    both_ways = link * BOTH_WAYS
    computing = s.accumulation * max(_launching_seconds(s), _gpu_seconds(s, model))
    forward = computing * _forward_share(s)
    backward = computing - forward
    forward_link, backward_link = (s.accumulation * size / link for size in _host_bytes(s))
    side_by_side = {
        "compute": computing,
        "host link": forward_link + backward_link,
        "network": _network_seconds(s, model, network_gb_s),
    }
    optimizer_gb_s = _optimizer_gb_s(s, model)
    one_after_the_other = {
        "optimizer": _optimizer_bytes(s) / (optimizer_gb_s * 1e9),
        "adding gradients": _gradients_travel(s) * (s.accumulation - 1) * s.gradients / (HOST_ADDING_GB_S * 1e9),
    }
    if s.holds_a_whole_copy:
        one_after_the_other[ADDING_UP] = _replicas_seconds(s, model, network_gb_s)
    if s.streams_adamw:
        read_for_the_norm = s.gradients / (optimizer_gb_s * 1e9)
        one_after_the_other["optimizer"] = read_for_the_norm + _streamed_bytes(s) / both_ways
    if s.optimizer_offload:
        one_after_the_other["optimizer"] = s.trainable / s.shards * (s.trained + 2 * s.optimizer_state) / both_ways
        travelling = (2 * s.accumulation - 1) * s.gradients / both_ways  # those of the first pass only go out
        one_after_the_other["gradients to host RAM"] = max(0.0, travelling - max(0.0, backward - backward_link))
    passes = max(forward, forward_link) + max(backward, backward_link)
    total = max(passes, side_by_side["network"]) + sum(one_after_the_other.values())
    return {**side_by_side, **one_after_the_other, "total": total}


def _launching_seconds(s: Setup) -> float:
    """Of one micro batch: what Python and the driver need, however few tokens there are."""
    return s.shape.layers * _layer_passes(s) * (SECONDS_PER_PASS[s.method] + _fsdp_seconds_per_pass(s))


def _fsdp_seconds_per_pass(s: Setup) -> float:
    if s.shards > 1:
        return SHARDED_SECONDS_PER_PASS[s.method]
    return TRAVELLING_SECONDS_PER_PASS if s.embedding_in_ram else 0.0


def _gpu_seconds(s: Setup, model: GpuModel) -> float:
    """Of one rank and micro batch: matrix products, and what only moves memory."""
    layers = (_layer_flops(s) + _weight_gradient_flops(s)) / (_fp8_speedup(s) if s.fp8 else 1)
    products = (layers + _head_flops(s)) / (model.bf16_tflops * 1e12 * COMPUTE_EFFICIENCY)
    products += _attention_flops(s) / (model.bf16_tflops * 1e12 * _attention_efficiency(s, model))
    return products + (_memory_bytes(s) + _sharding_bytes(s)) / (model.memory_gb_s * 1e9 * BANDWIDTH_EFFICIENCY)


def _fp8_speedup(s: Setup) -> float:
    return WIDE_FP8_SPEEDUP if s.shape.hidden >= WIDE else FP8_SPEEDUP


def _layer_passes(s: Setup) -> float:
    """Forward, backward and, to recompute, forward again: on average over the layers."""
    return 2 + s.recomputed_layers / s.shape.layers


def _forward_share(s: Setup) -> float:
    """Of computing: one of the passes, of which the gradients of trained weights are one more."""
    return 1 / (_layer_passes(s) + s.full)


def _layer_flops(s: Setup) -> float:
    """Of one rank and micro batch: 2 per weight of the layers and token, for each pass.

    What is computed again ends before down_proj, whose result the backward pass does not need. With adapters the rest
    of that pass, norms, dropout and their small products, takes what down_proj would.
    """
    weights, (rows, columns) = s.shape.layer_linear_weights, s.shape.linears["down_proj"]
    again = weights - rows * columns * s.full
    return 2 * s.tokens * (s.shape.layers * weights * 2 + s.recomputed_layers * again)


def _weight_gradient_flops(s: Setup) -> float:
    """The same of the gradients of trained weights, as much as a pass."""
    return 2 * s.tokens * s.shape.layers * s.shape.layer_linear_weights * s.full


def _head_flops(s: Setup) -> float:
    """The same of the head, by which the loss multiplies there and back."""
    return 2 * s.tokens * s.shape.embedding_weights * (2 + s.full)


def _attention_flops(s: Setup) -> float:
    """Of one rank and micro batch: half of all pairs; backward costs two and a half forwards.

    Rows are taken to be one example each: packed rows of many short ones need less.
    """
    pairs = s.tokens * s.max_length / 2
    passes = 2 if s.kept_attention else _layer_passes(s)
    return 4 * pairs * s.shape.heads * s.shape.head_dim * s.shape.layers * (passes + 1.5)


def _attention_efficiency(s: Setup, model: GpuModel) -> float:
    """Of the kernel that `fitune.model.attention` takes for a row that is one example."""
    if model.capability not in CUDNN_CAPABILITIES or s.max_length < CUDNN_FROM:
        return FLASH_EFFICIENCY
    return CUDNN_EFFICIENCY * s.max_length / (s.max_length + CUDNN_LOST_TOKENS)


def _memory_bytes(s: Setup) -> float:
    """Of one rank and micro batch: each pass writes once and reads twice what a layer saves, and dequantises NF4.

    For fp8 it rounds the linears' inputs, which it reads twice, and the weights, or turns those that are kept so. Where
    weights are trained backward rounds inputs again, and outputs' gradients in both directions.
    """
    weights, dequantised, rounded = s.shape.layer_linear_weights, 0.0, 0.0
    if s.fp8:
        h, i = s.hidden_state, s.inner_state
        dequantised = weights * ((s.compute if s.full else s.weight) + FP8)
        # of method full on average of a forward and a backward pass
        rounded = 11.5 * h + 5.5 * i if s.full else (3 * h + i) * (2 + FP8 / s.compute)
    elif s.method == "qlora":
        dequantised = weights * (NF4 + BF16)
    return s.shape.layers * _layer_passes(s) * (3 * s.saved_by_layer + dequantised + rounded)


def _sharding_bytes(s: Setup) -> float:
    """Of one rank and micro batch, in its own memory: what FSDP and its collectives read and write around the products.

    A rank casts its share of the weights and copies it into a buffer; gathered weights are copied out of another. One
    rank casts alone. Gradients are copied into a buffer, reduced, cast to what they are kept in, and added to those of
    earlier passes; one rank copies or adds. Those of a step's only pass are not cast.
    """
    several = s.shards > 1
    if not (several or s.reduced or s.cast):
        return 0.0
    casting = s.trained / s.compute + 1
    of_a_gathered_byte = (casting * s.cast + 2) / s.shards + 2 if several else casting
    arriving = s.trainable * (s.compute + s.reduce) * (s.full and not s.gradients_in_place)
    copied = _gathered_bytes(s) * of_a_gathered_byte + arriving
    reduced = (s.reduce + s.gradient) * (s.reduced and s.reduce != s.gradient)
    added = (s.trained + 2 * s.trained * s.reduced) * (s.accumulation > 1)
    own = s.trainable / s.shards * (reduced + added) * s.full
    return copied + own + COLLECTIVE_TRAFFIC * _shards_bytes(s) * several


def _host_bytes(s: Setup) -> tuple[float, float]:
    """Of one rank and micro batch, forward and backward: offloaded layers travel for each of both, unless they stay.

    Forward embedding (or its rows) and head travel in and layers' inputs out; backward these travel in, gradients out.
    """
    layers = s.shape.layers * s.layer_weights / s.shards * s.offload
    embedding = s.hidden_state if s.looks_up_in_host_ram else s.embedding / s.shards
    embeddings = (embedding * (not s.one_embedding) + s.embedding / s.shards) * s.embedding_in_ram
    forward = layers * min(1.0, s.gathers) + embeddings + s.inputs_in_host_ram
    backward = layers * max(0.0, s.gathers - 1) + s.inputs_in_host_ram + s.gradients * _gradients_travel(s)
    return forward, backward


def _gradients_travel(s: Setup) -> bool:
    """Whether each micro batch's gradients go to host RAM."""
    return s.offload and not s.accumulated_on_gpu


def _optimizer_gb_s(s: Setup, model: GpuModel) -> float:
    """What one rank's step reads and writes a second where its gradients lie."""
    if s.offload:
        return HOST_GB_S * s.machines / s.ranks
    return model.memory_gb_s * (SMALL_STEP_SHARE if s.small_states else ADAMW_SHARE)


def _optimizer_bytes(s: Setup) -> float:
    """Of one rank and step: clipping reads gradients; the step reads them, and reads and writes weight and moments."""
    return s.trainable / s.shards * (2 * (s.trained + s.optimizer_state) + 2 * s.gradient)


def _streamed_bytes(s: Setup) -> float:
    """Of one rank and step, both ways together: gradient, weight and moments travel in, weight and moments out."""
    return s.trainable / s.shards * (3 * s.trained + 2 * s.optimizer_state)


def _network_seconds(s: Setup, model: GpuModel, between_machines: float) -> float:
    """Of a step: shards of one copy gather weights and add up gradients.

    A ring that crosses machines runs at the slowest link; all ranks of a machine share its network.
    """
    ring = min(model.peer_link_gb_s, between_machines) if s.copies_a_machine < 1 else model.peer_link_gb_s
    seconds = s.accumulation * _shards_bytes(s) / (ring * BANDWIDTH_EFFICIENCY * 1e9)
    return seconds + _replicas_seconds(s, model, between_machines) * (not s.holds_a_whole_copy)


def _replicas_seconds(s: Setup, model: GpuModel, between_machines: float) -> float:
    """Of a step: copies of the model add up their gradients in float32, around rings inside machines and between."""
    times, link = 1 if s.reduced_once else s.accumulation, BANDWIDTH_EFFICIENCY * 1e9
    inside, across = max(1.0, s.copies_a_machine), min(s.replicas, s.machines)
    of_a_rank = _around_a_ring(s.trainable * FP32 / s.shards, inside) / (model.peer_link_gb_s * link)
    of_a_machine = _around_a_ring(s.trainable * FP32 * s.part_of_a_copy, across) / (between_machines * link)
    return times * (of_a_rank + of_a_machine)


def _shards_bytes(s: Setup) -> float:
    """Into one rank per micro batch: each layer gathered for forward and backward, gradients reduced."""
    reduced = s.trainable * s.reduce / (s.accumulation if s.adapters_wait else 1)
    return (_gathered_bytes(s) + reduced) * (s.shards - 1) / s.shards


def _gathered_bytes(s: Setup) -> float:
    """By one rank and micro batch: layers as often as they are, embedding and head once, which may be one tensor."""
    return s.gathers * s.shape.layers * s.gathered_layer + s.gathered_head * (1 + (not s.one_embedding))


def _around_a_ring(size: float, members: float) -> float:
    """Bytes into each of the members that add up `size` bytes around a ring and hand the sum on around it."""
    return 2 * size * (members - 1) / members
