"""How much memory a run needs, and for what: every formula, in bytes, over the sizes in `fitune.planning.sizes`.

The GPU's peak is the largest of a few moments of a step (`gpu_moments`): each is a table of what is alive then. What
no formula gives (the CUDA context, holes in the allocator's segments, the Python process) was measured; those numbers
stand in `MEASURED`, each with the runs it comes from. Two open ends are upper bounds: every token is taken to be an
answer token, and every row to be full.
"""

from dataclasses import dataclass

from fitune.config.model_shapes import ModelShape
from fitune.config.optimizer_pieces import FLOAT_SLOT_BYTES, SLOT_BYTES, SLOTS
from fitune.config.read_buffers import CHUNK_BYTES, READ_BUFFERS
from fitune.planning.layer_backward import layer_backward
from fitune.planning.sizes import BF16, FP32, GIB, NF4, NF4_STATISTICS, Setup


@dataclass(frozen=True)
class Measured:
    """What no formula gives. NVIDIA H200, torch 2.11, 2026-11-24; benchmarks/results/ and tests hold the runs."""

    cublas_workspace: float = 2 * 32 * 2**20
    "Bytes in torch's allocator: 32 MiB on Hopper (8 MiB before it) for the forward's and the backward's thread each."
    fragmentation: float = 0.01
    "Share of what is allocated that lies in holes: 0.8 to 1.1 GiB in five runs, with `freed_layers` on top."
    outside_allocator: float = 1.3 * GIB
    """Per process: CUDA context, kernels, NCCL. 1.27 to 1.40 with one rank, 1.11 to 1.15 where ranks share a GPU.

    1.55 to 1.60 of a rank among several, each on a GPU of its own (`benchmarks/results/tiers-h200x4-2026-11-27.json`).
    Their holes are fewer than `freed_layers` says: what each such run needed lies 0.75 GiB or more below the sum.
    """
    nccl: float = 0.85 * GIB
    """On top, of ranks that each have a whole copy and add up gradients: 2.12 in two runs on two GPUs, one rank's 1.27.

    0.38 where two such ranks share each GPU (`benchmarks/results/tiers-h200-2026-11-29.json`)."""
    loading: float = 2.25 * GIB
    "Host RAM of one process until training starts: Python, libraries, CUDA's host side, buffers. 2.1 to 2.35."
    training: float = 2.2 * GIB
    "The same during training: 2.1 to 2.45 in the four runs that offload."
    page_lock: float = 0.028
    "The driver's own pages per page-locked byte: 1.1 GiB for the 38.9 GiB of fsdp_offload_1x12gb."
    cpu_process: float = 0.9 * GIB
    "Host RAM of one process that trains on the CPU: 0.85 to 0.92 in two runs of cpu_2proc with a tiny model."
    launcher: float = 0.2 * GIB
    "accelerate launch and its helper, once per machine."


MEASURED = Measured()


def gpu_moments(s: Setup) -> dict[str, dict[str, float]]:
    """Phase -> what each GPU holds in torch's allocator then, in bytes. The peak is the largest sum."""
    several = s.shards > 1
    kept = s.kept_activations
    # gathering needs FSDP's all-gather buffer beside the result, and it still holds the previous layer's buffer
    gathering = {
        "unsharded head": s.unsharded_head,
        "gather buffers": (s.gathered_head + s.gathered_layer) if several else 0.0,
    }
    prefetched_layer = s.unsharded_layer * s.reshard  # torch 2.11 asks for the last one when the loss has gone backward
    first_layer = s.unsharded_layer * (s.shards == 1 and not s.full and s.accumulation > 1)  # stays for the next pass
    all_layers = s.shape.layers * s.unsharded_layer
    layers_in_forward = {} if s.reshard else {"unsharded layers": all_layers}
    stay_gathered = all_layers * s.stay_gathered
    head_reduction = s.shape.embedding_weights * s.reduce * s.reduced
    own_sum = head_reduction / s.shards * s.sums_apart  # the last one, until it is where it is kept
    head_sums = s.shape.embedding_weights / s.shards * s.held_sums
    layer_sums = s.gathered_layer / s.compute / s.shards * s.held_sums
    head_gradient = s.shape.embedding_weights * s.compute if s.full else 0.0
    # one tensor for both stays gathered to the end of the backward pass, which adds up its gradient
    one_embedding = {"unsharded head": s.unsharded_head, "gradient of the embedding": head_gradient}
    one_embedding = one_embedding if s.one_embedding else {}
    last_reduction = (head_reduction + s.new_head_gradient + head_sums) * (not s.one_embedding)
    layer_reduction = s.gathered_layer / s.compute * s.reduce * s.reduced
    last_layer, second_layer = (_one_layers_backward(s, is_kept) for is_kept in _last_and_first(s))
    fixed = {"cuBLAS workspace": MEASURED.cublas_workspace}
    always = resident(s)
    before = {**always, "gradients": s.waiting_gradients * s.accumulated_on_gpu, **fixed}
    stay = not (s.offload or s.optimizer_offload)
    left = s.gradients if s.accumulated_on_gpu or stay else s.leaving_gradients
    left = s.waiting_gradients if s.adapters_wait else left
    after = {**always, "gradients": left, **fixed}
    not_yet = s.last_gradients if stay and not s.accumulated_on_gpu else 0.0
    stepping = {**always, "gradients": s.gradients * stay, **fixed}
    if s.streams_adamw:
        stepping["pieces of the optimizer"] = SLOTS * FLOAT_SLOT_BYTES
    return {
        "load": {**resident(s, optimizer=False), "read buffers": READ_BUFFERS * CHUNK_BYTES},
        "forward, gathering the head": {
            **before, **layers_in_forward, **gathering, "kept activations": kept, "hidden states": s.hidden_state,
            "leaving gradients": s.leaving_head_gradient * (s.accumulation > 1)},  # the embedding's, of the pass before
        "forward, loss": {
            **before, **layers_in_forward, "unsharded head": s.unsharded_head + s.head_copy, "kept activations": kept,
            "hidden states": 3 * s.hidden_state, "loss workspace": _loss_forward(s)},
        "backward, loss": {
            **before, **layers_in_forward, "unsharded head": s.unsharded_head + s.head_copy,
            "gather buffers": prefetched_layer, "kept activations": kept, "hidden states": 2 * s.hidden_state,
            "loss workspace": _loss_backward(s)},
        "backward, last layer": {
            **before, "unsharded layers": s.unsharded_layer if s.reshard else all_layers,
            "gather buffers": prefetched_layer, "kept activations": kept + s.inputs_back * (not s.kept_layers),
            "hidden states": s.hidden_state, "one layer's backward": last_layer, "gradient reduction": last_reduction,
            "leaving gradients": s.leaving_head_gradient, **one_embedding},
        "backward, second layer": {
            **after, "gradients": after["gradients"] - not_yet,
            "unsharded layers": stay_gathered or s.unsharded_layer * (1 if s.reshard else 2),  # this one, and the first
            "gather buffers": prefetched_layer, "kept activations": _of_first_two_layers(s),
            "hidden states": s.hidden_state, "one layer's backward": second_layer,
            "gradient reduction": layer_reduction + layer_sums, **one_embedding},
        "backward, embedding": {
            **after, "unsharded layers": stay_gathered or first_layer, "hidden states": s.hidden_state, **one_embedding,
            "gradient of the embedding": head_gradient * (not (s.gradients_in_place or (s.reduced and not several))),
            "gradient reduction": head_reduction + own_sum, "leaving gradients": s.leaving_head_gradient},
        "optimizer step": stepping,
        "save": always,
    }  # fmt: skip


def _last_and_first(s: Setup) -> tuple[bool, bool]:
    """Whether the last layer keeps its activations, and whether the first ones do: the last are kept first."""
    return s.kept_layers > 0, s.kept_layers >= s.shape.layers


def _one_layers_backward(s: Setup, is_kept: bool) -> float:
    """Beside what is counted as kept activations."""
    return layer_backward(s, kept=is_kept) - _there_before(s, is_kept)


def _there_before(s: Setup, is_kept: bool) -> float:
    """Of what a layer's backward pass holds: what is counted as kept activations."""
    return s.saved_by_layer if is_kept else s.attention_result * s.kept_attention


def _of_first_two_layers(s: Setup) -> float:
    """What they keep: all of it where every layer does."""
    if s.kept_layers >= s.shape.layers:
        return 2 * s.kept_activations / s.shape.layers
    return s.inputs_back or 2 * s.kept_by_recomputed_layer


def resident(s: Setup, *, optimizer: bool = True) -> dict[str, float]:
    """On the GPU all the time: this rank's share of weights and optimizer state."""
    layers = 0.0 if s.offload else (s.shape.layers * s.layer_weights + s.shape.hidden * s.compute) / s.shards
    embeddings = 0.0 if s.embedding_in_ram else s.embeddings / s.shards
    mine = 0.0 if s.offload else s.trainable / s.shards
    return {
        "sharded weights": layers,
        "embedding and head": embeddings,
        "quantisation statistics": s.statistics,
        "LoRA weights": 0.0 if s.full else mine * FP32,
        "optimizer state": mine * s.optimizer_state * optimizer * (not s.optimizer_offload),
        "pieces of the optimizer": SLOTS * SLOT_BYTES * optimizer * s.optimizer_offload,
    }


def _loss_forward(s: Setup) -> float:
    """A tile of logits, which becomes its own gradient; in float32 that of hidden states and of a trained head."""
    return s.loss_tile + _loss_gradients(s) * FP32


def _loss_backward(s: Setup) -> float:
    """The gradients in float32, and scaled and rounded."""
    return _loss_gradients(s) * (FP32 + s.compute)


def _loss_gradients(s: Setup) -> float:
    """How many numbers they are."""
    return s.tokens * s.shape.hidden + s.shape.embedding_weights * s.trained_head


@dataclass(frozen=True)
class GpuPeak:
    phase: str
    components: dict[str, float]
    "Bytes at the peak, largest phase's."
    phases: dict[str, float]
    "Bytes in torch's allocator by phase."

    @property
    def allocated(self) -> float:
        return self.phases[self.phase]

    @property
    def total(self) -> float:
        return sum(self.components.values())


def gpu_peak(s: Setup) -> GpuPeak:
    """The peak of every GPU, what lies outside torch's allocations included."""
    moments = gpu_moments(s)
    phases = {phase: sum(parts.values()) for phase, parts in moments.items()}
    phase = max(phases, key=phases.get)
    freed_layers = s.unsharded_layer * (2 if s.shards > 1 else 1)  # the hole a layer leaves on each of FSDP's streams
    slack = MEASURED.fragmentation * phases[phase] + freed_layers
    outside = {"allocator slack": slack, "context, kernels, NCCL": outside_allocator(s)}
    components = {name: size for name, size in (moments[phase] | outside).items() if size}
    return GpuPeak(phase, components, phases)


def outside_allocator(s: Setup) -> float:
    """Of each process on a GPU, bytes."""
    return MEASURED.outside_allocator + MEASURED.nccl * (s.ranks > 1 and not s.unsharded_layer)


def host_moments(s: Setup) -> dict[str, dict[str, float]]:
    """Phase -> what one machine's RAM holds for all its ranks then, in bytes."""
    ranks = s.ranks / s.machines
    locked = _offloaded_weights(s) * s.copies_a_machine
    trainable = s.trainable * s.copies_a_machine
    own_weight = 0 if s.full else FP32  # method full's weights are the offloaded ones
    state_per_parameter = s.optimizer_state + s.trained + own_weight
    state = {"LoRA, gradients, optimizer state": trainable * state_per_parameter} if s.offload else {}
    always = {"offloaded weights": locked, "page-locking": locked * MEASURED.page_lock} if locked else {}
    if s.streams_adamw:
        state["page-locking"] = (locked + trainable * s.optimizer_state) * MEASURED.page_lock
    if s.optimizer_offload:
        states = trainable * (s.trained + s.optimizer_state)
        state = {"gradients, optimizer state": states, "page-locking": states * MEASURED.page_lock}
    activations = ranks * s.inputs_in_host_ram * (1 + MEASURED.page_lock)
    # those of one pass travel while the next one's are looked up
    rows = 2 * ranks * _power_of_two(s.hidden_state) if s.looks_up_in_host_ram else 0.0
    # a checkpoint is written tensor by tensor, each rank of the first copy its rows; an adapter's tensors are small
    copies = s.embedding * s.part_of_a_copy if s.saves and s.full and not s.offload else 0.0
    copy = {"copy of a checkpoint": checkpoint_copy(s)}
    # method full ends with gathering the largest tensor on one rank: before, every rank holds its part and rounds it
    gathered = s.embedding * 1.5 if s.full else 0.0
    if not s.on_gpu:
        return _on_cpu(s, {"tensor being saved": copies}, copy, gathered)
    loading, training = (MEASURED.launcher + ranks * process for process in (MEASURED.loading, MEASURED.training))
    return {
        "load": {"processes": loading, **always},
        "step": {
            "processes": training, **always, **state, "embedded rows": rows, "layers' inputs": activations, **copy},
        "save": {
            "processes": training, **always, **state, "layers' inputs": activations, **copy,
            "tensor being saved": max(copies, gathered)},
    }  # fmt: skip


def checkpoint_copy(s: Setup) -> float:
    """What `async_save` holds on a machine until the disk has it: its ranks' weights and optimizer state.

    An adapter's weights are gathered whole by rank 0. Of several copies of the model the first alone is saved.
    """
    if not (s.saves and s.async_save):
        return 0.0
    weights = s.trainable * s.trained * (s.part_of_a_copy if s.full else 1)
    return weights + s.trainable * s.optimizer_state * s.part_of_a_copy


def one_checkpoint(s: Setup) -> float:
    """Bytes on disk; an adapter's weights are there once, in the adapter."""
    return s.trainable * (s.trained + s.optimizer_state)


def host_peak(s: Setup) -> float:
    """The most that one machine's RAM holds for all its ranks, in bytes."""
    return max(sum(parts.values()) for parts in host_moments(s).values())


def _offloaded_weights(s: Setup) -> float:
    """Base weights in page-locked host RAM, of all ranks that hold one copy."""
    if s.offload:
        return s.shape.layers * s.layer_weights + s.embeddings
    return s.embeddings if s.embedding_offload else 0.0


def _power_of_two(size: float) -> float:
    """PyTorch rounds page-locked allocations up: 48 MiB of activations take 64 MiB."""
    return float(1 << (int(size) - 1).bit_length())


def _on_cpu(s: Setup, copies: dict[str, float], copy: dict[str, float], gathered: float) -> dict[str, dict[str, float]]:
    """Without GPUs all that a GPU would hold is host RAM, once per rank. An estimate: plain kernels take more."""
    processes = {"processes": MEASURED.launcher + s.ranks * MEASURED.cpu_process}
    moments = gpu_moments(s)
    peak = max(moments.values(), key=lambda parts: sum(parts.values()))
    resident = {name: s.ranks * size for name, size in moments["save"].items()}
    return {
        "load": {**processes, **{name: s.ranks * size for name, size in moments["load"].items()}},
        "step": {**processes, **{name: s.ranks * size for name, size in peak.items()}, **copy},
        "save": {**processes, **resident, **copies, **copy, "gathered tensor": gathered},
    }


def merge_host(s: Setup) -> float:
    """`merge` holds one tensor at a time: the weight and LoRA's product in float32, the sum in bf16. An estimate."""
    rows, columns = s.shape.linears["down_proj"]
    return MEASURED.cpu_process + max(rows * columns * (2 * FP32 + BF16), s.shape.embedding_weights * BF16)


def base_on_disk(shape: ModelShape) -> float:
    """Bytes of a base's files, of which each copy of the model reads all."""
    return _quantised_base(shape) if shape.nf4_on_disk else shape.parameters * BF16


def _quantised_base(shape: ModelShape) -> float:
    linears = shape.layers * shape.layer_linear_weights
    return linears * (NF4 + NF4_STATISTICS) + (shape.parameters - linears) * BF16


def disk(s: Setup, kept_checkpoints: int) -> dict[str, float]:
    """Bytes on disk by purpose. A new checkpoint is whole before the oldest goes, so there is room for one more."""
    quantised = _quantised_base(s.shape)
    result = s.trainable * (BF16 if s.full else FP32)
    return {
        "download": base_on_disk(s.shape),
        "checkpoints": one_checkpoint(s) * (kept_checkpoints + 1) if kept_checkpoints else 0.0,
        "result": result,
        "quantised copy (optional)": quantised if s.method == "qlora" and not s.shape.nf4_on_disk else 0.0,
        "merged model (later)": s.shape.parameters * BF16,
    }
