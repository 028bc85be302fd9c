"""A finished run asked on the machine that is here, which need not be one like that which trained it.

Where its GPUs are here and have room, a run is held as in training; of several whole copies one answers. Elsewhere its
weights are held as `planning.asking` says. The processes are told by `--held-by`, an accelerate config of their own.
The run's folder stays as it is.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from fitune.config.accelerate_config import read_accelerate_config
from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.planning.asked_folder import AskedFolder
from fitune.planning.asking import CONVERSATION, NF4_BITS, STORED, Holding, Reading, as_trained, choose, what_lacks
from fitune.planning.hardware import this_machine
from fitune.planning.limits import Limits, limits_for_asking
from fitune.planning.plan import setup_of
from fitune.planning.sizes import Setup
from fitune.training.model_run import needs, write_processes


@dataclass(frozen=True)
class Held:
    """How ranks are told to hold a run, where that is not as in training."""

    config: Path | None = None
    "The accelerate config that starts them; None: the run's own."
    rows: int | None = None
    "A pass, in `eval`; None: the run's own."

    @property
    def flags(self) -> list[str]:
        config = ["--held-by", str(self.config)] if self.config else []
        return [*config, *(["--rows", str(self.rows)] if self.rows else [])]


@contextmanager
def held_here(run: Run, reading: Reading = CONVERSATION) -> Iterator[Held]:
    """How a run is held here to read so much at once, fewer rows if it must be. UsageError where nothing holds it."""
    setup = _setup(run)
    limits = limits_for_asking(run) if setup else None  # asks the driver, once for all numbers of rows
    if setup and reading.answers and (way := _one_copy_alone(run, setup, reading)):
        with _processes(way) as held:
            yield held
        return
    if not setup or not (lacks := _lacks_as_trained(setup, reading, limits)):
        yield Held()
        return
    fewer = (replace(reading, rows=rows) for rows in range(reading.rows - 1, 0, -1))
    if less := next((part for part in fewer if not _lacks_as_trained(setup, part, limits)), None):
        print(f"{run.folder}: {less.rows} rows a pass, not {reading.rows} as in training: {lacks}", file=sys.stderr)
        yield Held(rows=less.rows)
        return
    way = _another_way(run, setup, replace(reading, rows=1), lacks)
    print(f"{run.folder}: {way}: {needs(way)}; as it was trained, {lacks}", file=sys.stderr)
    with _processes(way) as held:
        yield held


@contextmanager
def _processes(way: Holding) -> Iterator[Held]:
    with TemporaryDirectory(prefix="fitune-") as scratch:
        yield Held(Path(write_processes(way, Path(scratch)).path))


def rows_of_eval(run: Run) -> Reading:
    """What `eval` reads in one pass: as many rows as a pass of training, whose keys and values nobody asks for."""
    return Reading(run.recipe.max_length, run.profile.micro_batch, answers=False)


def as_held(run: Run, config: Path | None, rows: int | None = None) -> Run:
    """The run as ranks hold it that were started with `config`, one row a pass; None: as in training, by `rows`."""
    if not config:
        changed = {"micro_batch": rows} if rows else {}
        return run.model_copy(update={"profile": run.profile.model_copy(update=changed)})
    processes = read_accelerate_config(config)
    changed = {
        "num_gpus": 0 if processes.use_cpu else processes.num_processes, "micro_batch": 1, "kept_layers": 0,
        "kept_attention": False, "embedding_offload": False, "activation_offload": False, "replicas": 1,
    }  # fmt: skip
    return run.model_copy(update={"accelerate": processes, "profile": run.profile.model_copy(update=changed)})


def _setup(run: Run) -> Setup | None:
    """The run in numbers. None where it is held as it was trained in any case.

    Several machines and CPUs are left as they are, as is an architecture that `plan` doesn't know.
    """
    if run.accelerate.use_cpu or run.accelerate.num_machines > 1:
        return None
    try:
        return setup_of(run)
    except UsageError:
        return None


def _lacks_as_trained(setup: Setup, reading: Reading, limits: Limits) -> str:
    """What there is too little of here to hold a run as it was trained and read so much, '' where it fits."""
    if limits.gpus < setup.ranks:
        return f"it takes {setup.ranks} GPU{'s' * (setup.ranks > 1)}, this machine has {limits.gpus}"
    return what_lacks(as_trained(setup, reading), limits)


def _one_copy_alone(run: Run, setup: Setup, reading: Reading) -> Holding | None:
    """One GPU of a run whose GPUs each hold a whole copy: the others would answer the same. None if none has room."""
    if setup.holds_a_whole_copy:
        with suppress(UsageError):
            way = _another_way(run, setup, reading, "")
            return way if way.ranks == 1 and not way.offload else None
    return None


def _another_way(run: Run, setup: Setup, reading: Reading, lacks: str) -> Holding:
    """The first that fits. UsageError where none does, and for method full, whose result is a model's folder."""
    if run.recipe.method == "full" and run.checkpoint:
        raise UsageError(f"{run.checkpoint}: {lacks}; of method full the run's result alone goes elsewhere")
    if run.recipe.method == "full":
        raise UsageError(f"{run.folder}: {lacks}; give its model, which goes where it fits: {run.result_folder}")
    load = NF4_BITS if run.recipe.method == "qlora" else STORED
    asked = AskedFolder(setup.shape, setup.lora_r, setup.lora_targets, setup.trained_tokens)
    return choose(asked, this_machine(), load, reading=reading, name=str(run.result_folder))
