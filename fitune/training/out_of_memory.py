"""What a rank says when the GPU's memory ran out: what was asked for, what the plan had said, what to change."""

import re
from dataclasses import replace

import torch

from fitune.config.schema import Run
from fitune.errors import FituneError
from fitune.planning.limits import limits_of
from fitune.planning.outlook import nearest_changes
from fitune.planning.plan import make_plan
from fitune.planning.sizes import GIB


def explain_out_of_memory(run: Run, rank: int, error: torch.OutOfMemoryError) -> FituneError:
    """The error to show instead of torch's."""
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    held = torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0
    plan = make_plan(run, limits_of(run))
    predicted = plan.gpu.allocated / GIB if plan.gpu else 0.0
    compared = f"{held - predicted:+.1f} GiB to" if held > predicted else f"within {predicted - held:.1f} GiB of"
    # whatever the plan missed: a setting that it thinks takes a tenth less than this run
    smaller = replace(plan, limits=replace(plan.limits, gpu=plan.gpu.total / GIB * 0.9)) if plan.gpu else plan
    changes = " or ".join(nearest_changes(smaller)) if plan.gpu else ""
    return FituneError(
        f"rank {rank}: GPU memory ran out asking for {asked[1] if asked else 'more'} with {held:.1f} GiB allocated, "
        f"{compared} the {predicted:.1f} that `plan` says; "
        f"{f'try {changes}' if changes else 'take a tier with more memory'}, or end what else uses the GPU"
    )
