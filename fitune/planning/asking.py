"""How a model is held while `generate` and `eval` ask it: on one GPU or several, in host RAM; as stored or in NF4.

Nothing is trained, so weights, an adapter, one or two gathered layers, the head and the keys and values of a
conversation are all that takes memory.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fitune.config.command_name import command
from fitune.errors import UsageError
from fitune.planning.asked_folder import AskedFolder
from fitune.planning.limits import Limits, limits_here
from fitune.planning.machine import Machine
from fitune.planning.memory import MEASURED, gpu_peak, host_moments, resident
from fitune.planning.sizes import BF16, FP32, GIB, NF4, NF4_STATISTICS, Setup

STORED, NF4_BITS = "stored", "nf4"
LOADS = ("auto", STORED, NF4_BITS)
"What `--load` takes."
METHOD = {STORED: "lora", NF4_BITS: "qlora"}
"The method that computes with frozen weights as they are held."
TOKENS = 4096
"Of a conversation and its answer, for which room is left."


@dataclass(frozen=True)
class Holding:
    """One way to hold a model. Sizes in GiB."""

    load: str
    "`stored`: in bf16, as merged models are. `nf4`: the layers' products in 4 bits."
    ranks: int
    "GPUs; 0 on the CPU."
    offload: bool
    "Layers lie in host RAM, and visit the GPU for each token."
    gpu: float
    "Of each GPU."
    host: float

    @property
    def gathers(self) -> bool:
        """Whether weights travel for each token, so that several prompts are best asked at once."""
        return self.ranks > 1 or self.offload

    def __str__(self) -> str:
        weights = {STORED: "weights as stored", NF4_BITS: "weights in NF4"}[self.load]
        if not self.ranks:
            return f"{weights}, on the CPU"
        place = ", from host RAM layer by layer" if self.offload else ""
        return f"{weights}, on {self.ranks} GPU{'s' * (self.ranks > 1)}{place}"


def holdings(asked: AskedFolder, gpus: int, tokens: int = TOKENS) -> Iterator[Holding]:
    """All ways, those that answer fastest first: whole on one GPU, then over several, then out of host RAM."""
    loads = (NF4_BITS,) if asked.shape.nf4_on_disk else (STORED, NF4_BITS)
    if not gpus:
        yield from (_on_cpu(asked, load) for load in loads)
        return
    for load in loads:
        yield _on_gpus(asked, load, 1, False, tokens)
    for load in loads:
        for ranks in range(2, gpus + 1):
            yield _on_gpus(asked, load, ranks, False, tokens)
    for load in reversed(loads):  # a quarter of the bytes travels
        for ranks in range(1, gpus + 1):
            yield _on_gpus(asked, load, ranks, True, tokens)


def choose(asked: AskedFolder, machine: Machine, load: str = "auto", *, exact: bool = False, name: str = "") -> Holding:
    """The first way that fits what is free on a machine. UsageError where none does, with what comes nearest.

    `load` allows only one kind of weights. Without it an adapter is asked beside those that it was trained beside,
    where that is known; of the others `exact` prefers weights as stored, however slow.
    """
    if load == "auto" and asked.in_nf4:
        load = NF4_BITS
    ways = [way for way in holdings(asked, len(machine.gpus)) if load in ("auto", way.load)]
    if not ways:
        raise UsageError(f"{name}: its weights are in 4 bits already: leave out --load {load}")
    if exact and load == "auto":
        ways.sort(key=lambda way: way.load != STORED)  # stable: the fastest of each kind first
    if found := next((way for way in ways if fits(way, machine)), None):
        return found
    least = min(ways, key=lambda way: max(way.gpu - machine.gpu_memory_gib, way.host - machine.host_available_gib))
    raise UsageError(
        f"{name}: too large to ask here: {why_not(least, machine)}, with what takes least ({least}); end what else "
        f"uses that memory, or see `{command('plan', name)}`"
    )


def fits(way: Holding, machine: Machine) -> bool:
    return not why_not(way, machine)


def why_not(way: Holding, machine: Machine) -> str:
    """What there is too little of, '' where it fits."""
    return what_lacks(way, limits_here(machine))


def what_lacks(way: Holding, limits: Limits) -> str:
    """As `why_not`."""
    host = way.host + way.gpu * way.ranks * limits.unified
    if way.ranks and not limits.unified and way.gpu > (limits.gpu or 0):
        return f"{way.gpu:.1f} GiB of each GPU are needed, {limits.gpu:.1f} are free"
    if host > limits.host:
        return f"{host:.1f} GiB of RAM are needed, {limits.host:.1f} are free"
    return ""


def _on_gpus(asked: AskedFolder, load: str, ranks: int, offload: bool, tokens: int) -> Holding:
    return _holding(_setup(asked, load, ranks, offload, tokens), load)


def as_trained(trained: Setup) -> Holding:
    """How a run's own processes hold it when it is asked: never in fp8, a full run's weights in their trained dtype.

    It takes no more than training with bf16 products does, so a GPU that had room for that need not have room for a
    conversation of `TOKENS`.
    """
    tokens = min(TOKENS, trained.shape.max_positions)
    asked = {"micro_batch": 1, "max_length": tokens, "accumulation": 1, "packing": False, "kept_layers": 0}
    load = NF4_BITS if trained.method == "qlora" else STORED
    way = _holding(replace(trained, **asked, activation_offload=False, fp8=False, saves=False), load)
    return replace(way, gpu=min(way.gpu, gpu_peak(replace(trained, fp8=False)).total / GIB))


def _holding(setup: Setup, load: str) -> Holding:
    inside = asking_moment(setup)
    slack = MEASURED.fragmentation * sum(inside.values()) + setup.unsharded_layer
    total = sum(inside.values()) + slack + MEASURED.outside_allocator
    host = sum(host_moments(setup)["load"].values()) + setup.trainable * FP32 * setup.offload
    return Holding(load, setup.ranks, setup.offload, total / GIB, host / GIB)


def asking_moment(s: Setup) -> dict[str, float]:
    """What each GPU holds in torch's allocator while a prompt of `s.max_length` tokens is read, in bytes."""
    largest = max(math.prod(size) for size in s.shape.linears.values())
    keys_values = 2 * s.shape.layers * s.shape.kv_heads * s.shape.head_dim * s.tokens * s.compute
    return {
        **resident(s, optimizer=False),
        "unsharded layers": 2 * s.unsharded_layer,  # the one that computes and the next
        "gather buffers": s.gathered_head * (s.ranks > 1),
        "unsharded head": s.unsharded_head + s.head_copy,
        "keys and values": keys_values,
        "activations": 3 * s.inner_state + 4 * s.hidden_state + 2 * s.query_heads,
        "one dequantised weight": largest * s.compute * (s.method == "qlora"),
        "logits": s.loss_tile * FP32 / s.compute,
        "cuBLAS workspace": MEASURED.cublas_workspace,
    }


def _setup(asked: AskedFolder, load: str, ranks: int, offload: bool, tokens: int) -> Setup:
    return Setup(
        shape=asked.shape, method=METHOD[load], ranks=ranks, machines=1, micro_batch=1,
        max_length=min(tokens, asked.shape.max_positions), accumulation=1, packing=False,
        lora_r=asked.lora_r, lora_targets=asked.lora_targets, trained_tokens=asked.trained_tokens,
        offload=offload, saves=False,
    )  # fmt: skip


def _on_cpu(asked: AskedFolder, load: str) -> Holding:
    shape = asked.shape
    linears = shape.layers * shape.layer_linear_weights
    others = shape.layers * shape.layer_vector_weights + 2 * shape.embedding_weights
    # NF4's other weights are computed with in float32, and each product's own for a moment
    largest = max(math.prod(size) for size in shape.linears.values()) * FP32
    weights = (
        (linears + others) * BF16 if load == STORED else linears * (NF4 + NF4_STATISTICS) + others * FP32 + largest
    )
    adapter = _setup(asked, load, 1, False, TOKENS).trainable * FP32
    return Holding(load, 0, False, 0.0, (weights + adapter + MEASURED.cpu_process) / GIB)


def as_rows(asked: AskedFolder, machine: Machine) -> list[dict]:
    """Each way with its GiB and whether it fits, for `plan`. An adapter that was trained beside NF4 has those alone."""
    return [
        {
            "way": str(way),
            "gpu_gib": round(way.gpu, 2),
            "host_gib": round(way.host, 2),
            "fits": fits(way, machine),
            "why_not": why_not(way, machine) or None,
        }
        for way in holdings(asked, len(machine.gpus))
        if way.load == NF4_BITS or not asked.in_nf4
    ]
