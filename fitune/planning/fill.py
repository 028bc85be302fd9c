"""Fills the GPUs: for what is left to `plan`, copies of the model, rows a pass, kept layers and gathered weights.

More kept layers recompute less, and so do others that keep attention's result; more rows a pass launch fewer kernels
and gather fewer times, and gathered weights that stay until the backward pass are gathered once, not twice, or once a
step with method full. All of it takes memory. So do more copies of the model, of which each gathers over fewer GPUs,
or not at all. For each number of copies each number of rows is tried with as many kept layers as fit beside it, with
gathered weights freed and kept, where examples are long with attention kept, and with what recomputed layers keep on
the GPU and in host RAM. Of what is as fast as the fastest, that is taken which gathers nothing, else the fewest
copies, then what frees gathered weights, then what keeps no attention, then the fewest rows. What goes to host RAM
must be faster than all that stays.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

from fitune.config import run as runs
from fitune.config.schema import AUTO, Run
from fitune.errors import UsageError
from fitune.planning.async_save import with_async_save
from fitune.planning.compute import settled
from fitune.planning.gpu_models import GpuModel, likely_model, refuse_missing_bf16
from fitune.planning.limits import Limits, limits_of, limits_to_fill, machine_of
from fitune.planning.memory import gpu_peak, host_peak
from fitune.planning.plan import ERROR, setup_of, verdicts, with_free_memory
from fitune.planning.run_length import example_of_a_token
from fitune.planning.sizes import GIB, Setup
from fitune.planning.step_time import step_seconds

ATTENTION_COUNTS_FROM = 8192
"Tokens of an example: in shorter ones a kept layer saves more for its memory than kept attention."
AS_FAST = 0.02
"Of a step's seconds: for less, no more rows a pass are taken, no gathered weights kept, no copies added."
MUST_GAIN_BY_MOVING = {"lora": 0.05, "qlora": 0.05, "full": 0.15}
"""Of a step's seconds, by method, for activations to go to host RAM: others use that and the link, too. For 70B QLoRA
9 % were measured on four cards of 24 GB, 10 and 34 % on one of 12 GB (docs/speed.md); with method full nothing."""
Timed = Callable[[Setup], float]
"What gives a setup's seconds of a step, on the GPU and the network that count."


def resolve(
    recipe: str, profile: str, sets: tuple[str, ...] = (), output: str | None = None, gpu: GpuModel | None = None,
    network: float | None = None,
) -> Run:  # fmt: skip
    """`fitune.config.run.resolve`, filled for the GPUs that the profile states. Raises UsageError."""
    run = runs.resolve(recipe, profile, sets, output)
    return filled(run, limits_of(run), gpu, network)


def filled_here(run: Run) -> Run:
    """The run filled for the GPUs that it takes here, and for no more of their memory than its profile states."""
    machine, limits = machine_of(run), limits_to_fill(run)
    return filled(settled(with_free_memory(run, limits), machine.known_model), limits, machine.model)


def filled(run: Run, limits: Limits, gpu: GpuModel | None = None, network: float | None = None) -> Run:
    """The run with numbers for what its profile leaves to `plan`; the smallest ones where nothing fits.

    `gpu` is the model whose speed counts; None, and a run on the CPU, take the typical one with so much memory.
    `network` is what several machines have between them, in GB/s. Raises UsageError for a GPU without bf16.
    """
    if gpu is None or run.accelerate.use_cpu:
        gpu = likely_model(run.profile.gpu_memory_gib or 0)
    refuse_missing_bf16(gpu)
    run = settled(run, None if run.accelerate.use_cpu else gpu)
    timed = partial(_seconds, gpu=gpu, network=network)
    run = _with_rows_and_layers(run, limits, timed) if run.profile.replicas != AUTO else _spread(run, limits, timed)
    return with_async_save(run, limits)


def _seconds(setup: Setup, gpu: GpuModel, network: float | None) -> float:
    return step_seconds(setup, gpu, network)["total"]


def _spread(run: Run, limits: Limits, timed: Timed) -> Run:
    """The run with a number of copies of its model: of a base that is not there the question stays open."""
    counts = _copies(run)
    one_copy = _with_replicas(run, 1, limits, timed)
    if counts == [1]:
        return one_copy
    try:
        setup_of(run)
    except UsageError:
        return run
    choices = [one_copy, *(_with_replicas(run, count, limits, timed) for count in counts[1:])]
    setups = [setup for choice in choices if fits(setup := setup_of(choice), with_room_for_error(limits))]
    if run.recipe.method != "full":  # weights cross the network between machines only where they must
        setups = [setup for setup in setups if setup.replicas >= setup.machines] or setups
    if not setups:
        return one_copy
    seconds = [_cautious_seconds(setup, timed) for setup in setups]
    as_fast = [setup for setup, took in zip(setups, seconds, strict=True) if took <= (1 + AS_FAST) * min(seconds)]
    best = min(as_fast, key=lambda setup: (not setup.holds_a_whole_copy, setup.replicas))
    return choices[counts.index(best.replicas)]


def _copies(run: Run) -> list[int]:
    """The numbers of copies to try. What lies in RAM lies there once a machine: its GPUs share the RAM's bandwidth."""
    machines = run.accelerate.num_machines
    counts = runs.possible_replicas(run.accelerate.num_processes, machines)
    in_ram = run.embedding_in_ram or run.profile.optimizer_offload
    return [count for count in counts if count <= machines or not in_ram]


def _with_replicas(run: Run, count: int, limits: Limits, timed: Timed) -> Run:
    profile = run.profile.model_copy(update={"replicas": count})
    return _with_rows_and_layers(run.model_copy(update={"profile": profile}), limits, timed)


def _with_rows_and_layers(run: Run, limits: Limits, timed: Timed) -> Run:
    ways = _resharding(run)
    run = runs.with_resharding(run, ways[0])
    attention, moved = _kept_attention(run), _moved_activations(run, limits)
    if not run.left_to_plan and len(ways) == len(attention) == len(moved) == 1:
        return runs.with_activations(run, kept_attention=attention[0], activation_offload=moved[0])
    setup = setup_of(run)
    tried = [
        replace(setup, reshard=way, kept_attention=kept, activation_offload=in_ram)
        for way, kept, in_ram in product(ways, attention, moved)
    ]
    choices = [choice for setup in tried for choice in _that_fit(run, setup, with_room_for_error(limits))]
    if not choices:  # what takes least, which fits where rows and layers that are given take some of that room
        is_settled = len(moved) == 1 or fits(setup, limits)
        moves = moved[0] if is_settled else _comes_closer_with_ram(setup, limits)
        run = runs.with_activations(run, kept_attention=attention[0], activation_offload=moves)
        run = runs.with_numbers(run, micro_batch=_rows_that_take_least(run, setup))
        return run.model_copy(update={"left_to_plan": ()})
    best = _best(choices, timed)
    activations = {"kept_attention": best.kept_attention, "activation_offload": best.activation_offload}
    run = runs.with_resharding(runs.with_activations(run, **activations), best.reshard)
    return runs.with_numbers(run, **{key: getattr(best, key) for key in run.left_to_plan})


def _that_fit(run: Run, setup: Setup, limits: Limits) -> list[Setup]:
    """A setup with each number of rows that fits, and the most kept layers beside them.

    Of several passes more rows take more; a step's only pass may take less, as its gradients need not add up.
    """
    *several, only = _rows(run)
    batch, there = run.recipe.global_batch_size, _with_ram_for_inputs(setup, limits)

    def does_fit(count: int) -> bool:
        return fits(setup.of_rows(several[count - 1], batch), there)

    rows = [*several[: largest(len(several), does_fit)], only]
    return [choice for count in rows if (choice := _most_kept(run, setup, count, limits))]


def _resharding(run: Run) -> tuple[bool, ...]:
    """The values of `reshard_after_forward` to try, first what takes less memory."""
    said = run.accelerate.reshard_after_forward
    if said != AUTO:
        return (said,)
    return (True, False) if run.may_keep_gathered else (True,)


def _kept_attention(run: Run) -> tuple[bool, ...]:
    """The values of `kept_attention` to try, first what takes less memory."""
    if run.profile.kept_attention != AUTO:
        return (run.profile.kept_attention,)
    if run.recipe.max_length < ATTENTION_COUNTS_FROM:  # no report need be read
        return (False,)
    return (False, True) if example_of_a_token(run.recipe) >= ATTENTION_COUNTS_FROM else (False,)


def _moved_activations(run: Run, limits: Limits) -> tuple[bool, ...]:
    """The values of `activation_offload` to try, first what takes no host RAM."""
    if run.profile.activation_offload != AUTO:
        return (run.profile.activation_offload,)
    return (False,) if run.accelerate.use_cpu or limits.unified else (False, True)


def _comes_closer_with_ram(setup: Setup, limits: Limits) -> bool:
    """Whether moving what recomputed layers keep takes something off the GPU, and RAM has room for it."""
    in_ram = replace(setup, activation_offload=True)
    return gpu_peak(in_ram).total < gpu_peak(setup).total and host_peak(in_ram) <= limits.host * GIB


def _best(choices: list[Setup], timed: Timed) -> Setup:
    """The best one that keeps everything on the GPU, or the best other one, where that gains enough."""
    by_place = [[choice for choice in choices if choice.activation_offload == moved] for moved in (False, True)]
    best = [_least_of_the_fastest(there, timed) for there in by_place if there]
    return min(best, key=lambda choice: _cautious_seconds(choice, timed))


def _least_of_the_fastest(choices: list[Setup], timed: Timed) -> Setup:
    """Of the choices that are as fast as the fastest, the one that takes least, in the order told above."""
    seconds = [timed(choice) for choice in choices]
    as_fast = [choice for choice, took in zip(choices, seconds, strict=True) if took <= (1 + AS_FAST) * min(seconds)]
    return min(as_fast, key=lambda choice: (not choice.reshard, choice.kept_attention, choice.micro_batch))


def _cautious_seconds(setup: Setup, timed: Timed) -> float:
    """Of a step, with what it must gain by activations in host RAM."""
    return timed(setup) * gain_by_moving(setup)


def gain_by_moving(setup: Setup) -> float:
    """What a step's seconds are multiplied by where activations go to host RAM."""
    return 1 + MUST_GAIN_BY_MOVING[setup.method] * setup.activation_offload


def with_room_for_error(limits: Limits) -> Limits:
    """As much less GPU memory as the prediction may be off."""
    if limits.unified:
        return replace(limits, host=limits.host / (1 + ERROR))
    return limits if limits.gpu is None else replace(limits, gpu=limits.gpu / (1 + ERROR))


def _rows(run: Run) -> list[int]:
    """The micro batches to try."""
    if "micro_batch" not in run.left_to_plan:
        return [run.profile.micro_batch]
    return runs.micro_batches(run.recipe, run.accelerate)


def _rows_that_take_least(run: Run, setup: Setup) -> int:
    """Of a GPU: mostly one, but gradients of a step's only pass may take half of those that passes add up."""
    rows, batch = _rows(run), run.recipe.global_batch_size
    return min((rows[0], rows[-1]), key=lambda rows: (gpu_peak(setup.of_rows(rows, batch)).total, rows))


def _most_kept(run: Run, setup: Setup, rows: int, limits: Limits) -> Setup | None:
    """A micro batch with as many kept layers as fit, or as are given; None if it doesn't fit."""
    with_rows = setup.of_rows(rows, run.recipe.global_batch_size)
    if "kept_layers" in run.left_to_plan:
        there, layers = _with_ram_for_inputs(setup, limits), setup.shape.layers
        all_kept = replace(with_rows, kept_layers=layers)
        if fits(all_kept, limits):  # as of most ways to spread few rows over many GPUs
            return all_kept
        kept = largest(layers - 1, lambda layers: fits(replace(with_rows, kept_layers=layers), there))
        with_rows = replace(with_rows, kept_layers=kept)
    return with_rows if fits(with_rows, limits) else None


def _with_ram_for_inputs(setup: Setup, limits: Limits) -> Limits:
    """What decides about kept layers: they take GPU memory, and no host RAM for their inputs, where that is apart."""
    apart = setup.activation_offload and not limits.unified
    return replace(limits, host=math.inf) if apart else limits


def fits(setup: Setup, limits: Limits) -> bool:
    return all(verdict.fits for verdict in verdicts(setup, limits))


def largest(most: int, is_good) -> int:
    """The largest number up to `most` for which `is_good` holds, which it does up to some number."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_good(middle) else (low, middle)
    return low
