"""How a model is held while `generate` and `eval` ask it: on one GPU or several, in host RAM; as stored or in NF4.

Nothing is trained, so weights, an adapter, one or two gathered layers, the head and the keys and values of a
conversation are all that takes memory.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fitune.config.command_name import command
from fitune.config.tiles import LOSS_TOKENS
from fitune.errors import UsageError
from fitune.planning.asked_folder import AskedFolder
from fitune.planning.limits import Limits, limits_here
from fitune.planning.machine import Gpu, Machine
from fitune.planning.memory import MEASURED, gpu_peak, host_moments, outside_allocator, resident
from fitune.planning.sizes import BF16, FP32, GIB, NF4, NF4_STATISTICS, Setup
from fitune.planning.words import numbers

STORED, NF4_BITS = "stored", "nf4"
METHOD = {STORED: "lora", NF4_BITS: "qlora"}
"The method that computes with frozen weights as they are held."


@dataclass(frozen=True)
class Reading:
    """What is read in one pass, for which there must be room."""

    tokens: int
    "Of a row, or of a conversation with its answer."
    rows: int = 1
    answers: bool = True
    "Keys and values of all layers stay, for an answer. Rows that are measured leave none."


CONVERSATION = Reading(4096)


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
    cards: tuple[Gpu, ...] = ()
    "The GPUs that its ranks take; none: the first ones."

    @property
    def gathers(self) -> bool:
        """Whether weights travel for each token, so that several prompts are best asked at once."""
        return self.ranks > 1 or self.offload

    def __str__(self) -> str:
        weights = {STORED: "weights as stored", NF4_BITS: "weights in NF4"}[self.load]
        if not self.ranks:
            return f"{weights}, on the CPU"
        place = ", from host RAM layer by layer" if self.offload else ""
        which = f" ({numbers(self.cards)})" if self.cards else ""
        return f"{weights}, on {self.ranks} GPU{'s' * (self.ranks > 1)}{which}{place}"


def holdings(asked: AskedFolder, gpus: int, reading: Reading = CONVERSATION) -> Iterator[Holding]:
    """All ways, those that answer fastest first: whole on one GPU, then over several, then out of host RAM."""
    loads = (NF4_BITS,) if asked.shape.nf4_on_disk else (STORED, NF4_BITS)
    if not gpus:
        yield from (_on_cpu(asked, load) for load in loads)
        return
    for load in loads:
        yield _on_gpus(asked, load, 1, False, reading)
    for load in loads:
        for ranks in range(2, gpus + 1):
            yield _on_gpus(asked, load, ranks, False, reading)
    for load in reversed(loads):  # a quarter of the bytes travels
        for ranks in range(1, gpus + 1):
            yield _on_gpus(asked, load, ranks, True, reading)


def choose(
    asked: AskedFolder, machine: Machine, load: str = "auto", *,
    reading: Reading = CONVERSATION, exact: bool = False, name: str = "",
) -> Holding:  # fmt: skip
    """The first way that fits what is free on a machine. UsageError where none does, with what comes nearest.

    `load` allows only one kind of weights. Without it an adapter is asked beside those that it was trained beside,
    where that is known; of the others `exact` prefers weights as stored, however slow.
    """
    if load == "auto" and asked.in_nf4:
        load = NF4_BITS
    ways = [way for way in _placed_ways(asked, machine, reading) if load in ("auto", way.load)]
    if not ways:
        raise UsageError(f"{name}: its weights are in 4 bits already: leave out --load {load}")
    if exact and load == "auto":
        ways.sort(key=lambda way: way.load != STORED)  # stable: the fastest of each kind first
    if found := next((way for way in ways if fits(way, machine)), None):
        return found
    least = min(ways, key=lambda way: max(way.gpu - _limits(way, machine).gpu, way.host - machine.host_available_gib))
    raise UsageError(
        f"{name}: too large to ask here: {why_not(least, machine)}, with what takes least ({least}); end what else "
        f"uses that memory, or see `{command('plan', name)}`"
    )


def as_plain(way: Holding, asked: AskedFolder, reading: Reading) -> Holding:
    """The same by plain transformers, which have the logits of all of a row's tokens at once where it is measured.

    Those of its answers follow in float32, as do their log-probabilities; every token may be one.
    """
    if reading.answers or not way.ranks:
        return way
    tokens = min(reading.tokens, asked.shape.max_positions)
    beyond_a_tile = tokens * (BF16 + 2 * FP32) - min(tokens, LOSS_TOKENS) * FP32
    return replace(way, gpu=way.gpu + beyond_a_tile * asked.shape.vocabulary / GIB)


def fits(way: Holding, machine: Machine) -> bool:
    return not why_not(way, machine)


def why_not(way: Holding, machine: Machine) -> str:
    """What there is too little of, '' where it fits."""
    return what_lacks(way, _limits(way, machine))


def _limits(way: Holding, machine: Machine) -> Limits:
    return limits_here(replace(machine, gpus=way.cards or machine.gpus[: way.ranks]))


def _placed_ways(asked: AskedFolder, machine: Machine, reading: Reading = CONVERSATION) -> Iterator[Holding]:
    """All ways on the GPUs that they take: the first ones, and where these have too little room, the emptiest.

    All ranks of a way need as much, so the fullest of its GPUs counts; one that others have filled is left to them.
    """
    for way in holdings(asked, len(machine.gpus), reading):
        emptiest = machine.emptiest(way.ranks).gpus
        yield replace(way, cards=emptiest) if why_not(way, machine) and emptiest != machine.gpus[: way.ranks] else way


def what_lacks(way: Holding, limits: Limits) -> str:
    """As `why_not`."""
    host = way.host + way.gpu * way.ranks * limits.unified
    if way.ranks and not limits.unified and way.gpu > (limits.gpu or 0):
        return f"{way.gpu:.1f} GiB of each GPU are needed, {limits.gpu:.1f} are free"
    if host > limits.host:
        return f"{host:.1f} GiB of RAM are needed, {limits.host:.1f} are free"
    return ""


def _on_gpus(asked: AskedFolder, load: str, ranks: int, offload: bool, reading: Reading) -> Holding:
    return _holding(_setup(asked, load, ranks, offload, reading), load, reading)


def as_trained(trained: Setup, reading: Reading = CONVERSATION) -> Holding:
    """How a run's own processes hold it when it is asked: never in fp8, a full run's weights in their trained dtype.

    It takes no more than training with bf16 products does, so a GPU that had room for that need not have room for a
    longer conversation.
    """
    tokens = min(reading.tokens, trained.shape.max_positions)
    asked = {"micro_batch": reading.rows, "max_length": tokens, "accumulation": 1, "kept_layers": 0}
    asked |= {"kept_attention": False, "activation_offload": False, "fp8": False, "saves": False}
    load = NF4_BITS if trained.method == "qlora" else STORED
    way = _holding(replace(trained, **asked), load, reading)
    return replace(way, gpu=min(way.gpu, gpu_peak(replace(trained, fp8=False)).total / GIB))


def _holding(setup: Setup, load: str, reading: Reading) -> Holding:
    inside = asking_moment(setup, answers=reading.answers)
    slack = MEASURED.fragmentation * sum(inside.values()) + setup.unsharded_layer
    total = sum(inside.values()) + slack + outside_allocator(setup)
    host = sum(host_moments(setup)["load"].values()) + setup.trainable * FP32 * setup.offload
    return Holding(load, setup.ranks, setup.offload, total / GIB, host / GIB)


def asking_moment(s: Setup, *, answers: bool = True) -> dict[str, float]:
    """What each GPU holds in torch's allocator while rows, or a prompt for `answers`, of `s.tokens` are read: bytes."""
    largest = max(math.prod(size) for size in s.shape.linears.values())
    keys_values = 2 * s.shared_heads * (s.shape.layers if answers else 1)
    return {
        **resident(s, optimizer=False),
        "unsharded layers": 2 * s.unsharded_layer,  # the one that computes and the next
        "gather buffers": s.gathered_head * (s.shards > 1),
        "unsharded head": s.unsharded_head + s.head_copy,
        "keys and values": keys_values,
        "activations": 3 * s.inner_state + 4 * s.hidden_state + 2 * s.query_heads,
        "one dequantised weight": largest * s.compute * (s.method == "qlora"),
        "logits": min(s.tokens, LOSS_TOKENS) * s.shape.vocabulary * FP32,
        "cuBLAS workspace": MEASURED.cublas_workspace,
    }


def _setup(asked: AskedFolder, load: str, ranks: int, offload: bool, reading: Reading) -> Setup:
    return Setup(
        shape=asked.shape, method=METHOD[load], ranks=ranks, machines=1, micro_batch=reading.rows,
        max_length=min(reading.tokens, asked.shape.max_positions), accumulation=1,
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
    adapter = _setup(asked, load, 1, False, CONVERSATION).trainable * FP32
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
        for way in _placed_ways(asked, machine)
        if way.load == NF4_BITS or not asked.in_nf4
    ]
