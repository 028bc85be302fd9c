"""A finished run asked on the machine that is here, which need not be one like that which trained it.

Where its GPUs are here and have room, a run is held as in training. Elsewhere its weights are held as `planning.asking`
says, and the processes are told by `--held-by`, an accelerate config of their own. The run's folder stays as it is.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fitune.config.accelerate_config import read_accelerate_config
from fitune.config.model_shapes import find_shape
from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.planning.asked_folder import AskedFolder
from fitune.planning.asking import NF4_BITS, STORED, Holding, as_trained, choose, what_lacks
from fitune.planning.hardware import this_machine
from fitune.planning.limits import limits_for_asking
from fitune.planning.plan import setup_of
from fitune.training.model_run import needs, write_processes


@contextmanager
def held_here(run: Run) -> Iterator[Path | None]:
    """The accelerate config that a run is asked with; None for its own. UsageError where nothing here holds it."""
    way = _another_way(run)
    if not way:
        yield None
        return
    print(f"{run.folder}: {way}: {needs(way)}", file=sys.stderr)
    with TemporaryDirectory(prefix="fitune-") as scratch:
        yield Path(write_processes(way, Path(scratch)).path)


def held_by_flag(config: Path | None) -> list[str]:
    """What tells the ranks of it."""
    return ["--held-by", str(config)] if config else []


def as_held(run: Run, config: Path | None) -> Run:
    """The run as ranks that were started with `config` hold it, one row a pass; None: as it was trained."""
    if not config:
        return run
    processes = read_accelerate_config(config)
    changed = {
        "num_gpus": 0 if processes.use_cpu else processes.num_processes, "micro_batch": 1, "kept_layers": 0,
        "embedding_offload": False, "activation_offload": False, "hybrid_sharding": False,
    }  # fmt: skip
    return run.model_copy(update={"accelerate": processes, "profile": run.profile.model_copy(update=changed)})


def _another_way(run: Run) -> Holding | None:
    """How to hold a run that this machine cannot hold as it was trained. Several machines and CPUs are left as they
    are: what the run says of them counts.
    """
    if run.accelerate.use_cpu or run.accelerate.num_machines > 1:
        return None
    try:
        shape = find_shape(run.recipe.base.model, run.recipe.base.revision)
    except UsageError:  # an architecture that `plan` doesn't know
        return None
    setup, limits = setup_of(run, shape), limits_for_asking(run)
    trained = as_trained(setup)
    lacks = what_lacks(trained, limits)
    if limits.gpus < trained.ranks:
        lacks = f"it was trained on {trained.ranks} GPU{'s' * (trained.ranks > 1)}, {limits.gpus} are here"
    if not lacks:
        return None
    if run.recipe.method == "full":
        raise UsageError(f"{run.folder}: {lacks}; give its model, which goes where it fits: {run.result_folder}")
    load = NF4_BITS if run.recipe.method == "qlora" else STORED
    asked = AskedFolder(shape, setup.lora_r, setup.lora_targets)
    return choose(asked, this_machine(), load, name=str(run.result_folder))
