"""What is said when memory ran out: what was asked for, what was allocated, what to change."""

import re
from dataclasses import replace

import torch

from fitune.config.schema import Run
from fitune.errors import FituneError, is_out_of_gpu_memory
from fitune.planning.limits import limits_of
from fitune.planning.outlook import nearest_changes
from fitune.planning.plan import make_plan
from fitune.planning.sizes import GIB

END_OTHERS = "or end what else uses the GPU"


def explain_out_of_memory(run: Run, rank: int, error: BaseException) -> FituneError:
    """The error to show instead of torch's while training: with what `plan` had said, and a setting that takes less."""
    if _in_host_ram(error):
        return FituneError(f"rank {rank}: {_what_ran_out(error)}; take a profile without offload, or more RAM")
    plan = make_plan(run, limits_of(run))
    held, predicted = _held_gib(), plan.gpu.allocated / GIB if plan.gpu else 0.0
    compared = f"{held - predicted:+.1f} GiB to" if held > predicted else f"within {predicted - held:.1f} GiB of"
    # whatever the plan missed: a setting that it thinks takes a tenth less than this run
    smaller = replace(plan, limits=replace(plan.limits, gpu=plan.gpu.total / GIB * 0.9)) if plan.gpu else plan
    changes = " or ".join(nearest_changes(smaller)) if plan.gpu else ""
    return FituneError(
        f"rank {rank}: {_what_ran_out(error)}, {compared} the {predicted:.1f} that `plan` says; "
        f"{f'try {changes}' if changes else 'take a tier with more memory'}, {END_OTHERS}"
    )


def explain_in_eval(run: Run, rank: int, error: BaseException) -> FituneError:
    """In `eval`, which takes the run's rows a pass."""
    if _in_host_ram(error):
        return explain_out_of_memory(run, rank, error)
    rows, file = run.profile.micro_batch, run.folder / "run.yaml"
    fewer = f"try micro_batch: {rows // 2} under profile: in {file}" if rows > 1 else "take GPUs with more memory"
    return FituneError(f"rank {rank}: {_what_ran_out(error)}; {fewer}, {END_OTHERS}")


def explain_in_generate(run: Run, rank: int, error: BaseException) -> FituneError:
    """In `generate` from a run."""
    if _in_host_ram(error):
        return explain_out_of_memory(run, rank, error)
    shorter = "ask for less with --max-new-tokens, or shorter prompts"
    return FituneError(f"rank {rank}: {_what_ran_out(error)}; {shorter}, {END_OTHERS}")


def explain_in_one_process(error: BaseException) -> FituneError:
    """In commands that use one device, where there is a GPU: `merge`, `quantize`, `generate` from a model's folder."""
    if _in_host_ram(error):
        return FituneError(f"{_what_ran_out(error)}; end what else uses it")
    on_cpu = "do without it, more slowly, with CUDA_VISIBLE_DEVICES= in front of the command"
    return FituneError(f"{_what_ran_out(error)}; {on_cpu}, {END_OTHERS}")


def _what_ran_out(error: BaseException) -> str:
    if _in_host_ram(error):
        asked = re.search(r"tried to allocate (\d+) bytes", str(error))
        return f"host RAM ran out asking for {f'{int(asked[1]) / GIB:.2f} GiB' if asked else 'more'}"
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    return f"GPU memory ran out asking for {asked[1] if asked else 'more'} with {_held_gib():.1f} GiB allocated"


def _in_host_ram(error: BaseException) -> bool:
    return not is_out_of_gpu_memory(error)


def _held_gib() -> float:
    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0
