"""Plans and machines in a few words, as `plan`, `train` and `doctor` say them."""

import math
from collections.abc import Sequence

from fitune.planning.machine import MOSTLY_FREE, Gpu, Machine
from fitune.planning.plan import Plan
from fitune.planning.sizes import Setup

ON_GPUS, EMBEDDING_IN_RAM, ALL_IN_RAM = "weights on the GPUs", "embedding in RAM", "weights in RAM"
STATES_IN_RAM = "gradients and optimizer states in RAM"
KEEPS_GATHERED = "gathered weights kept"


def described(plan: Plan) -> str:
    """A plan's choices in a few words."""
    setup = plan.setup
    rows = f"{setup.micro_batch} row{'s' * (setup.micro_batch > 1)} a pass"
    return ", ".join([held(plan), rows, kept_in_words(setup), *([] if setup.reshard else [KEEPS_GATHERED])])


def held(plan: Plan) -> str:
    """By how many ranks, and where what lasts is kept."""
    ranks = ranks_in_words(plan.setup)
    if plan.run.accelerate.gpu_ids:
        ranks += f" ({numbers(plan.used_cards)})"
    return ", ".join([ranks + copies_in_words(plan.setup), *places(plan)])


def kept_in_words(setup: Setup) -> str:
    """Which layers keep what until the backward pass, and where."""
    layers = f"{setup.kept_layers} of {setup.shape.layers} layers kept"
    if not setup.recomputed_layers or not (setup.kept_attention or setup.activation_offload):
        return layers
    what = [*["inputs"] * setup.activation_offload, *["attention"] * setup.kept_attention]
    return f"{layers}, {' and '.join(what)} of the others{' in RAM' * setup.activation_offload}"


def ranks_in_words(setup: Setup) -> str:
    """How many train together."""
    one = "GPU" if setup.on_gpu else "CPU process"
    return f"1 {one}" if setup.ranks == 1 else f"{setup.ranks} {one}{'s' if setup.on_gpu else 'es'}"


def copies_in_words(setup: Setup) -> str:
    """How many copies of the model they hold, behind a comma; '' of a single rank."""
    if setup.ranks == 1:
        return ""
    if setup.replicas == 1:
        return ", one copy of the model"
    return ", a copy of the model on each" if setup.shards == 1 else f", {setup.replicas} copies of the model"


def numbers(gpus: Sequence[Gpu]) -> str:
    """As nvidia-smi numbers them."""
    return ", ".join(gpu.shown_as for gpu in gpus)


def places(plan: Plan) -> list[str]:
    """Where it keeps what lasts from step to step."""
    setup = plan.setup
    place = ALL_IN_RAM if setup.offload else EMBEDDING_IN_RAM if setup.embedding_offload else ON_GPUS
    found = [place] if setup.on_gpu else []
    if setup.small_states:
        found.append("small optimizer states in RAM" if setup.optimizer_offload else "small optimizer states")
    return found


def timed(plan: Plan) -> str:
    """Its predicted step."""
    if plan.time is None or not plan.time.is_known:
        return "time not predicted"
    return f"{rounded(plan.time.parts['total'])} s a step"


def rounded(number: float) -> str:
    """To two digits, which is more than an estimate can promise."""
    return f"{float(f'{number:.2g}'):,g}"


def machine_in_words(machine: Machine) -> str:
    count = len(machine.gpus)
    free, total = machine.gpu_memory_gib, max((gpu.total_gib for gpu in machine.gpus), default=0.0)
    taken = f" (of {total:.1f}, others use the rest)" if free < MOSTLY_FREE * total and not machine.uneven else ""
    each = ", ".join(f"{gpu.free_gib:.1f}" for gpu in machine.gpus) if machine.uneven else f"{free:.1f}"
    gpus = f"{count} GPU{'s' * (count > 1)} with {each} GiB free{taken}" if count else "a machine without GPUs"
    host = "" if math.isinf(machine.host_available_gib) else f" and {machine.host_available_gib:.1f} GiB of free RAM"
    return gpus + host
