"""How much memory a run needs, and for what: every formula, in bytes.

    h = hidden size, i = intermediate size, T = tokens of one forward pass (micro batch x max_length)

The GPU's peak is the largest of a few moments of a step (`gpu_moments`): each is a table of what is alive then. What
no formula gives (the CUDA context, holes in the allocator's segments, the Python process) was measured; those numbers
stand in `MEASURED`, each with the runs it comes from. Two open ends are upper bounds: every token is taken to be an
answer token, and every row to be full.
"""

from dataclasses import dataclass

from fitune.model_shapes import ModelShape

GIB = 2**30
BF16, FP32 = 2, 4  # bytes
NF4 = 0.5  # bytes per weight, packed
NF4_STATISTICS = 1 / 64 + FP32 / (64 * 256)  # an 8-bit scale per 64 weights, a float32 one per 256 of those
ADAM_STATE = 2 * FP32  # exp_avg and exp_avg_sq
READ_BUFFERS = 4 * 64 * 2**20  # fitune.streaming: THREADS x CHUNK_BYTES
LOSS_TILE = (4096, 32768)  # tokens x vocabulary that TRL's fused loss multiplies at once (trl.kernels.chunked_logprob)


@dataclass(frozen=True)
class Measured:
    """What no formula gives. NVIDIA H200, torch 2.11, 2026-11-24; benchmarks/results/ and tests hold the runs."""

    cublas_workspace: float = 2 * 32 * 2**20
    "Bytes in torch's allocator: 32 MiB on Hopper (8 MiB before it) for the forward's and the backward's thread each."
    fragmentation: float = 0.01
    "Share of what is allocated that lies in holes: 0.8 to 1.1 GiB in five runs, with `freed_layers` on top."
    outside_allocator: float = 1.3 * GIB
    "Per process: CUDA context, kernels, NCCL. 1.28 to 1.35 with one rank, 1.14 with four (NCCL over loopback)."
    loading: float = 2.3 * GIB
    "Host RAM of one process until training starts: Python, libraries, CUDA's host side, buffers. 2.3 with 1, 2, 4."
    training: float = 2.2 * GIB
    "The same during training: 2.1 to 2.45 in the four runs that offload."
    page_lock: float = 0.028
    "The driver's own pages per page-locked byte: 1.1 GiB for the 38.9 GiB of fsdp_offload_1x12gb."
    cpu_process: float = 0.9 * GIB
    "Host RAM of one process that trains on the CPU: 0.85 to 0.92 in two runs of cpu_2proc with a tiny model."
    launcher: float = 0.2 * GIB
    "accelerate launch and its helper, once per machine."


MEASURED = Measured()


@dataclass(frozen=True)
class Setup:
    """The numbers that decide how much memory a run needs. `fitune.plan` fills it from a resolved run."""

    shape: ModelShape
    method: str
    ranks: int
    machines: int
    micro_batch: int
    max_length: int
    accumulation: int
    "Micro batches per optimizer step."
    packing: bool
    compute: int = BF16
    "Bytes of one activation: bf16 on GPUs, float32 on CPUs."
    optimizer_state: float = ADAM_STATE
    "Bytes per trained parameter."
    lora_r: int = 0
    lora_targets: frozenset[str] = frozenset()
    lora_dropout: bool = False
    trained_tokens: int = 0
    offload: bool = False
    "Sharded weights, gradients and optimizer state live in host RAM."
    embedding_offload: bool = False
    checkpointing: bool = True
    activation_offload: bool = False
    reshard: bool = True
    on_gpu: bool = True
    saves: bool = True
    "Writes checkpoints on the way."

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.max_length

    @property
    def full(self) -> bool:
        return self.method == "full"

    # Weights

    @property
    def weight(self) -> float:
        """Bytes of one decoder-layer weight as stored: float32 master weights, packed NF4, or as it computes."""
        return {"full": FP32, "qlora": NF4}.get(self.method, self.compute)

    @property
    def lora_per_layer(self) -> int:
        """Parameters of A [r, in] and B [out, r] of every targeted linear."""
        return sum(self.lora_r * sum(self.shape.linears[name]) for name in self.lora_targets)

    @property
    def trainable(self) -> int:
        """Parameters."""
        if self.full:
            return self.shape.parameters
        return self.shape.layers * self.lora_per_layer + 2 * self.trained_tokens * self.shape.hidden

    @property
    def layer_weights(self) -> float:
        """Base weights of one layer as stored; norms are never quantised."""
        norm = FP32 if self.full else self.compute
        return self.shape.layer_linear_weights * self.weight + self.shape.layer_norm_weights * norm

    @property
    def embedding(self) -> float:
        """Embedding or head as stored; neither is ever quantised."""
        return self.shape.embedding_weights * (FP32 if self.full else self.compute)

    @property
    def statistics(self) -> float:
        """NF4's scales, whole on every rank and on the GPU even when the weights are offloaded."""
        linears = self.shape.layers * self.shape.layer_linear_weights
        return linears * NF4_STATISTICS if self.method == "qlora" else 0.0

    @property
    def gathered_layer(self) -> float:
        """One layer as it computes, all ranks' rows; LoRA is gathered in float32."""
        if self.full:
            return (self.shape.layer_linear_weights + self.shape.layer_norm_weights) * self.compute
        return self.layer_weights + self.lora_per_layer * FP32

    @property
    def gathered_head(self) -> float:
        return self.shape.embedding_weights * self.compute

    @property
    def unsharded_layer(self) -> float:
        """What a gathered layer takes beside this rank's share. One rank uses what lies on the GPU where it is."""
        return 0.0 if self._in_place and not self.offload else self.gathered_layer

    @property
    def unsharded_head(self) -> float:
        return 0.0 if self._in_place and not (self.offload or self.embedding_offload) else self.gathered_head

    @property
    def head_copy(self) -> float:
        """The head with its trained rows in place, for the loss."""
        return self.gathered_head if self.trained_tokens else 0.0

    @property
    def _in_place(self) -> bool:
        """Whether a weight that lies on the GPU is one to compute with: whole, and not in need of a cast."""
        return self.ranks == 1 and not (self.full and self.compute != FP32)

    @property
    def gradients(self) -> float:
        """This rank's, bytes."""
        return self.trainable / self.ranks * FP32

    @property
    def accumulated_on_gpu(self) -> bool:
        """Whether gradients wait there for the next micro batch: one rank keeps an adapter's even if it offloads."""
        return self.accumulation > 1 and (not self.offload or (self.ranks == 1 and not self.full))

    # Activations, bytes

    @property
    def hidden_state(self) -> float:
        """[T, h]."""
        return self.tokens * self.shape.hidden * self.compute

    @property
    def inner_state(self) -> float:
        """[T, i]."""
        return self.tokens * self.shape.intermediate * self.compute

    @property
    def shared_heads(self) -> float:
        """Keys, or values [T, kv_heads x head_dim]."""
        return self.tokens * self.shape.kv_heads * self.shape.head_dim * self.compute

    @property
    def mask_positions(self) -> int:
        """Pairs of tokens that sdpa has a mask for. On GPUs packed rows need none: see `fitune.attention`."""
        if self.packing:
            return 0 if self.on_gpu else self.tokens**2
        return self.micro_batch * self.max_length**2

    @property
    def down_input(self) -> float:
        """What down_proj keeps for its backward pass: its input, or LoRA's dropped-out copy and its mask [T, i]."""
        if self.full or ("down_proj" in self.lora_targets and not self.lora_dropout):
            return self.inner_state
        return self.inner_state * (1 + 1 / self.compute) if "down_proj" in self.lora_targets else 0.0

    @property
    def saved_by_layer(self) -> float:
        """What one layer keeps for its backward pass with Liger's kernels, its input left out."""
        h, i = self.hidden_state, self.inner_state
        if self.mask_positions:
            attention = 4 * h  # query, keys and values repeated for all heads (a masked sdpa wants that), output
        else:
            softmax_sums = self.tokens * self.shape.heads * FP32
            attention = 2 * h + 2 * self.shared_heads + softmax_sums
        bias = self.mask_positions * self.compute  # sdpa turns the boolean mask into one of the compute dtype
        mlp = h + 2 * i  # RMSNorm's input; gate and up, SwiGLU's inputs
        return attention + bias + mlp + self._inputs_of_trained_linears() + self.down_input

    def _inputs_of_trained_linears(self) -> float:
        """All but down_proj. LoRA with dropout keeps a copy and a mask per linear; else linears share their input."""
        attention = {"q_proj", "k_proj", "v_proj"} & self.lora_targets
        mlp = {"gate_proj", "up_proj"} & self.lora_targets
        if self.full:
            return 2 * self.hidden_state
        if not self.lora_dropout:
            return (bool(attention) + bool(mlp)) * self.hidden_state
        count = len(attention) + len(mlp) + ("o_proj" in self.lora_targets)
        return count * self.hidden_state * (1 + 1 / self.compute)

    @property
    def layer_backward(self) -> float:
        """Peak while a layer is recomputed and goes backward, beside its gathered weights and output gradient."""
        h, i, saved = self.hidden_state, self.inner_state, self.saved_by_layer
        down = self.shape.linears["down_proj"][0] * self.shape.linears["down_proj"][1] * self.compute
        if self.full:
            mlp_gradients = 3 * down  # gate, up and down have equally many weights
            return max(
                saved + i + down,  # down_proj's backward: its input's gradient and its own
                saved - 2 * i + 2 * h + mlp_gradients,  # gate's: down's and up's activations are gone
                self.gathered_layer + 2 * h,  # the end: all gradients of the layer
            )
        keeps_input = "down_proj" in self.lora_targets and not self.lora_dropout  # LoRA keeps down_proj's input itself
        recomputing = saved + 3 * h + (0.0 if keeps_input else i)  # down_proj's output, LoRA's, their sum; its input
        if self.method == "qlora":
            recomputing = max(recomputing, saved - self.down_input + 2 * i + down)  # backward: the dequantised weight
        return recomputing

    @property
    def kept_activations(self) -> float:
        """Alive from forward to backward: each layer's input, or without checkpointing all it saves."""
        per_layer = self.hidden_state if self.checkpointing else self.saved_by_layer + 2 * self.hidden_state
        return self.shape.layers * per_layer

    @property
    def loss_tile(self) -> float:
        tokens, columns = LOSS_TILE
        return min(self.tokens, tokens) * columns * self.compute


def gpu_moments(s: Setup) -> dict[str, dict[str, float]]:
    """Phase -> what each GPU holds in torch's allocator then, in bytes. The peak is the largest sum."""
    several = s.ranks > 1
    kept = 0.0 if s.activation_offload and s.checkpointing else s.kept_activations
    mask = s.mask_positions * 1  # the boolean mask, shared by all layers
    # gathering needs FSDP's all-gather buffer beside the result, and it still holds the previous layer's buffer
    gathering = {
        "unsharded head": s.unsharded_head,
        "gather buffers": (s.gathered_head + s.gathered_layer) if several else 0.0,
    }
    prefetched_layer = s.unsharded_layer
    layers_in_forward = {} if s.reshard else {"unsharded layers": s.shape.layers * s.unsharded_layer}
    head_reduction = s.shape.embedding_weights * FP32 if s.full else 0.0
    layer_reduction = s.gathered_layer / s.compute * FP32 if s.full else 0.0
    recompute = s.layer_backward - (0.0 if s.checkpointing else s.saved_by_layer)
    fixed = {"attention mask": mask, "cuBLAS workspace": MEASURED.cublas_workspace}
    before = {**_resident(s), "gradients": s.gradients * s.accumulated_on_gpu, **fixed}
    after = {**_resident(s), "gradients": s.gradients * (s.accumulated_on_gpu or not s.offload), **fixed}
    stepping = {**_resident(s), "gradients": s.gradients * (not s.offload), **fixed}
    return {
        "load": {**_resident(s, optimizer=False), "read buffers": READ_BUFFERS},
        "forward, gathering the head": {
            **before, **layers_in_forward, **gathering, "kept activations": kept, "hidden states": s.hidden_state},
        "forward, loss": {
            **before, **layers_in_forward, "unsharded head": s.unsharded_head + s.head_copy, "kept activations": kept,
            "hidden states": 3 * s.hidden_state, "loss workspace": s.loss_tile},
        "backward, loss": {
            **before, **layers_in_forward, "unsharded head": s.unsharded_head + s.head_copy,
            "gather buffers": prefetched_layer, "kept activations": kept, "hidden states": 2 * s.hidden_state,
            "loss workspace": _loss_backward(s)},
        "backward, last layer": {
            **before, "unsharded layers": s.unsharded_layer if s.reshard else s.shape.layers * s.unsharded_layer,
            "gather buffers": prefetched_layer if s.reshard else 0.0, "kept activations": kept,
            "hidden states": s.hidden_state, "one layer's backward": recompute, "gradient reduction": head_reduction},
        "backward, second layer": {
            **after, "unsharded layers": s.unsharded_layer, "gather buffers": prefetched_layer,
            "kept activations": 2 * kept / s.shape.layers, "hidden states": s.hidden_state,
            "one layer's backward": recompute, "gradient reduction": layer_reduction},
        "optimizer step": stepping,
        "save": _resident(s),
    }  # fmt: skip


def _resident(s: Setup, *, optimizer: bool = True) -> dict[str, float]:
    """On the GPU all the time: this rank's share of weights and optimizer state."""
    layers = 0.0 if s.offload else (s.shape.layers * s.layer_weights + s.shape.hidden * s.compute) / s.ranks
    embeddings = 0.0 if s.offload or s.embedding_offload else 2 * s.embedding / s.ranks
    mine = 0.0 if s.offload else s.trainable / s.ranks
    return {
        "sharded weights": layers,
        "embedding and head": embeddings,
        "quantisation statistics": s.statistics,
        "LoRA weights": 0.0 if s.full else mine * FP32,
        "optimizer state": mine * s.optimizer_state * optimizer,
    }


def _loss_backward(s: Setup) -> float:
    """A tile of logits, the hidden states' gradient in float32 and rounded; a trained head's likewise."""
    hidden = s.tokens * s.shape.hidden
    head = s.shape.embedding_weights if s.full or s.trained_tokens else 0
    return s.loss_tile + (hidden + head) * (FP32 + s.compute)


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
    freed_layers = s.unsharded_layer * (2 if s.ranks > 1 else 1)  # the hole a layer leaves on each of FSDP's streams
    slack = MEASURED.fragmentation * phases[phase] + freed_layers
    outside = {"allocator slack": slack, "context, kernels, NCCL": MEASURED.outside_allocator}
    components = {name: size for name, size in (moments[phase] | outside).items() if size}
    return GpuPeak(phase, components, phases)


def host_moments(s: Setup) -> dict[str, dict[str, float]]:
    """Phase -> what one machine's RAM holds for all its ranks then, in bytes."""
    ranks = s.ranks / s.machines
    locked = _offloaded_weights(s) / s.machines
    trainable = s.trainable / s.machines
    own_weight = 0 if s.full else FP32  # method full's weights are the offloaded ones
    state_per_parameter = s.optimizer_state + FP32 + own_weight
    state = {"LoRA, gradients, optimizer state": trainable * state_per_parameter} if s.offload else {}
    always = {"offloaded weights": locked, "page-locking": locked * MEASURED.page_lock} if locked else {}
    activations = ranks * s.shape.layers * _power_of_two(s.hidden_state) if s.activation_offload else 0.0
    # a checkpoint is written tensor by tensor, each rank its rows; an adapter's tensors are small
    copies = s.embedding / s.machines if s.saves and s.full and not s.offload else 0.0
    # method full ends with gathering the largest tensor on one rank: the parts, the whole, and the whole rounded
    gathered = s.embedding * 2.5 if s.full else 0.0
    if not s.on_gpu:
        return _on_cpu(s, {"checkpoint copies": copies}, gathered)
    loading, training = (MEASURED.launcher + ranks * process for process in (MEASURED.loading, MEASURED.training))
    return {
        "load": {"processes": loading, **always},
        "step": {"processes": training, **always, **state, "kept activations": activations},
        "save": {"processes": training, **always, **state, "checkpoint copies": max(copies, gathered)},
    }


def _offloaded_weights(s: Setup) -> float:
    """Base weights in page-locked host RAM, all ranks together."""
    embeddings = 2 * s.embedding
    if s.offload:
        return s.shape.layers * s.layer_weights + embeddings
    return embeddings if s.embedding_offload else 0.0


def _power_of_two(size: float) -> float:
    """PyTorch rounds page-locked allocations up: 48 MiB of activations take 64 MiB."""
    return float(1 << (int(size) - 1).bit_length())


def _on_cpu(s: Setup, copies: dict[str, float], gathered: float) -> dict[str, dict[str, float]]:
    """Without GPUs all that a GPU would hold is host RAM, once per rank. An estimate: plain kernels take more."""
    processes = {"processes": MEASURED.launcher + s.ranks * MEASURED.cpu_process}
    moments = gpu_moments(s)
    peak = max(moments.values(), key=lambda parts: sum(parts.values()))
    resident = {name: s.ranks * size for name, size in moments["save"].items()}
    return {
        "load": {**processes, **{name: s.ranks * size for name, size in moments["load"].items()}},
        "step": {**processes, **{name: s.ranks * size for name, size in peak.items()}},
        "save": {**processes, **resident, **copies, "gathered tensor": gathered},
    }


def merge_host(s: Setup) -> float:
    """`merge` holds one tensor at a time: the weight and LoRA's product in float32, the sum in bf16. An estimate."""
    rows, columns = s.shape.linears["down_proj"]
    return MEASURED.cpu_process + max(rows * columns * (2 * FP32 + BF16), s.shape.embedding_weights * BF16)


def disk(s: Setup, kept_checkpoints: int) -> dict[str, float]:
    """Bytes on disk by purpose. A new checkpoint is whole before the oldest goes, so there is room for one more."""
    weights = s.shape.layers * s.shape.layer_linear_weights
    quantised = weights * (NF4 + NF4_STATISTICS) + (s.shape.parameters - weights) * BF16
    result = s.trainable * (BF16 if s.full else FP32)
    one_checkpoint = s.trainable * (FP32 + s.optimizer_state)  # weights in the adapter or beside the state
    return {
        "download": quantised if s.shape.nf4_on_disk else s.shape.parameters * BF16,
        "checkpoints": one_checkpoint * (kept_checkpoints + 1) if kept_checkpoints else 0.0,
        "result": result,
        "quantised copy (optional)": quantised if s.method == "qlora" and not s.shape.nf4_on_disk else 0.0,
        "merged model (later)": s.shape.parameters * BF16,
    }
