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
from fitune.planning.sizes import Setup
from fitune.training.model_run import needs, write_processes


@contextmanager
def held_here(run: Run) -> Iterator[Path | None]:
    """The accelerate config that a run is asked with; None for its own. UsageError where nothing here holds it."""
    setup = _setup(run)
    if not setup or not (lacks := _lacks_as_trained(run, setup)):
        yield None
        return
    way = _another_way(run, setup, lacks)
    print(f"{run.folder}: {way}: {needs(way)}; as it was trained, {lacks}", file=sys.stderr)
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


def _setup(run: Run) -> Setup | None:
    """The run in numbers. None where it is held as it was trained in any case.

    Several machines and CPUs are left as they are, as is an architecture that `plan` doesn't know.
    """
    if run.accelerate.use_cpu or run.accelerate.num_machines > 1:
        return None
    try:
        return setup_of(run, find_shape(run.recipe.base.model, run.recipe.base.revision))
    except UsageError:
        return None


def _lacks_as_trained(run: Run, setup: Setup) -> str:
    """What there is too little of here to hold a run as it was trained, '' where it fits."""
    limits = limits_for_asking(run)
    if limits.gpus < setup.ranks:
        return f"it takes {setup.ranks} GPU{'s' * (setup.ranks > 1)}, this machine has {limits.gpus}"
    return what_lacks(as_trained(setup), limits)


def _another_way(run: Run, setup: Setup, lacks: str) -> Holding:
    """The first that fits. UsageError where none does, and for method full, whose result is a model's folder."""
    if run.recipe.method == "full":
        raise UsageError(f"{run.folder}: {lacks}; give its model, which goes where it fits: {run.result_folder}")
    load = NF4_BITS if run.recipe.method == "qlora" else STORED
    asked = AskedFolder(setup.shape, setup.lora_r, setup.lora_targets, setup.trained_tokens)
    return choose(asked, this_machine(), load, name=str(run.result_folder))
