"""Starts a run's processes through `accelerate launch`, in this process so that they inherit the terminal."""

import logging
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fitune.columns import columns, short
from fitune.config import run as runs
from fitune.config.accelerate_config import read_accelerate_config
from fitune.config.command_name import command
from fitune.config.host_limits import usable_cores
from fitune.config.schema import Run
from fitune.config.shipped import python_path
from fitune.environment import HEARTBEATS, let_segments_grow
from fitune.errors import CRASHED, ENDED_BY_A_SIGNAL, INTERRUPTED, FituneError, say_while_training
from fitune.launching.finished import finished_at
from fitune.launching.run_folder import ASKED, launch_config, settings_to_train
from fitune.launching.run_status import read_status, stopped_before_a_step
from fitune.launching.signals import Killed, interrupts_passed_on, passed_on_to_ranks
from fitune.launching.terminal import Show, run_shown
from fitune.output_folder import checkpoints
from fitune.planning.hardware import this_machine

TRAINING = "fitune.training.train"
LONG_WORD = 14
"YAML's lines end with the word that passes their width."
Place = Mapping[str, int | str | None]
"A machine's among several, in accelerate's words: machine_rank, main_process_ip, main_process_port."
NO_PLACE: Place = {}
Beside = Callable[[Callable[[FituneError], None]], AbstractContextManager]
"Entered while ranks run, with what ends them."
alone: Beside = nullcontext
JOIN_SECONDS = 120
"""How long the launchers of machines that have met wait for each other. After a crash they wait longer: each starts its
ranks again when it has noticed.

No signal reaches them meanwhile. By itself torch would wait for a quarter of an hour."""
TALKATIVE = ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api")
"""Loggers of torch's launcher that print pages: of a rank that failed, which has said so, and of a machine 0 that ended
a moment before another one. The second has a level of its own."""
TOLD = -signal.SIGTERM
"Not an exit code: processes were ended by a signal that was passed on to them."


def launch_line(run: Run, module: str, *arguments: str) -> str:
    """The command that starts `module` on a run's folder, as typed in a shell. Of a resume by what it asks for."""
    settings = settings_to_train(run.folder)
    config = launch_config(run, settings) if settings.name == ASKED else run.accelerate.path
    config = ["accelerate", "launch", "--config_file", short(str(config))]
    return shlex.join([*config, "-m", module, short(str(settings)), *arguments])


def dry_run_text(run: Run, *, resume: bool = False) -> str:
    """run.yaml, in lines as wide as the terminal, and the line that starts its training. All of it is YAML."""
    file, settings = short(str(run.folder / "run.yaml")), runs.in_yaml(run, columns() - LONG_WORD)
    line = launch_line(run, TRAINING, *(["--resume"] if resume else []))
    return f"# {file}\n{settings}\n# It is started with:\n# {line}"


def train_with_restarts(
    run: Run, *, resume: bool, max_restarts: int, place: Place, beside: Beside = alone, quiet: bool = False
) -> int:
    """Trains, and after a crash goes on from the newest checkpoint, at most `max_restarts` times; the exit code.

    A crash is a rank that died, hung or raised what fitune did not expect; an error that fitune explains would only
    come again. `beside` looks after other machines. `quiet` leaves out all but errors and warnings.
    """
    with run_shown(live=not run.recipe.training.get("disable_tqdm"), quiet=quiet) as show:
        for restart in range(max_restarts + 1):
            join_seconds = None if restart else JOIN_SECONDS
            code, signals = _train_once(run, resume, place, show, beside, join_seconds)
            if code == TOLD:
                say_while_training(stopped_before_a_step(run.folder))
            if signals == 1 and code in (TOLD, CRASHED):  # while the ranks were starting
                return INTERRUPTED
            if code != CRASHED or signals or restart == max_restarts:
                break
            resume = True
            saved = checkpoints(run.folder / "checkpoints")
            start = "the newest checkpoint" if saved else "the beginning, there is no checkpoint yet"
            print(f"restart {restart + 1} of {max_restarts}, from {start}", file=sys.stderr)
        if code == CRASHED and run.accelerate.num_machines == 1 and checkpoints(run.folder / "checkpoints"):
            say_while_training(f"go on with: {command('train', '--resume', short(str(run.folder)))}")
    return 1 if code in (TOLD, CRASHED) else code


def _train_once(
    run: Run, resume: bool, place: Place, show: Show, beside: Beside, join_seconds: int | None
) -> tuple[int, int]:
    """(exit code, how many signals told the run to stop), with all ranks of this machine watched."""
    from fitune.launching.heartbeat import Watch

    arguments = ["--resume"] if resume else []
    with tempfile.TemporaryDirectory(prefix="fitune-") as folder:
        os.environ[HEARTBEATS] = folder
        processes = run.accelerate.num_processes // run.accelerate.num_machines
        show(f"starting {processes} process{'es' * (processes > 1)}", lambda: read_status(Path(folder)))
        watch = Watch(Path(folder), run.accelerate.num_machines)
        watch.start()
        settings, finished = settings_to_train(run.folder), finished_at(run.folder)
        try:
            signals = passed_on_to_ranks(TRAINING, watch.has_begun_to_train)
            with signals as received, beside(watch.end_ranks):
                watched = {"told": received, "explained": watch.ended, "join_seconds": join_seconds}
                try:
                    code = launch(run, TRAINING, *arguments, settings=settings, place=place, **watched)
                except FituneError:
                    if watch.reason is None:
                        raise
                    code = CRASHED  # for the reason that was told
            if code == TOLD and watch.has_begun_to_train():
                code = INTERRUPTED  # rank 0 has said so; torch's launcher ended it on its way out, after another rank
            if received and finished_at(run.folder) not in (None, finished):
                code = 0  # they came when all was done
        finally:
            watch.stop()
    return watch.reason.exit_code if watch.reason else code, len(received)


def launch_until_stopped(
    run: Run,
    module: str,
    *arguments: str,
    config: Path | None = None,
    place: Place = NO_PLACE,
    beside: Beside = alone,
    interrupts_go_on: bool = False,
) -> int:
    """`launch` for what has nothing to save: a signal ends all processes; the exit code is then 128 + its number.

    `beside` looks after other machines. With `interrupts_go_on` Ctrl-C doesn't end them, which is then the processes'
    own business.
    """
    interrupts = interrupts_passed_on(module) if interrupts_go_on else nullcontext()
    killed = Killed(module)
    with passed_on_to_ranks(module) as received, interrupts, beside(killed.end_ranks):
        watched = {"told": received, "explained": killed.pids}
        try:
            code = launch(run, module, *arguments, config=config, place=place, join_seconds=JOIN_SECONDS, **watched)
        except FituneError:
            if killed.reason is None:
                raise
            code = CRASHED  # for the reason that was told
    if received:
        say_while_training("stopped")
        return ENDED_BY_A_SIGNAL + received[0]
    if killed.reason:
        return killed.reason.exit_code
    return 1 if code == CRASHED else code


def launch(
    run: Run,
    module: str,
    *arguments: str,
    settings: Path | None = None,
    config: Path | None = None,
    place: Place = NO_PLACE,
    join_seconds: int | None = None,
    told: Collection[int] = (),
    explained: Collection[int] = (),
) -> int:
    """Runs `module` on all processes of a run and returns the exit code of the first one that failed (0: none).

    Launchers of several machines wait `join_seconds` for each other. Raises FituneError where one does not come.

    `settings` stands for the folder's run.yaml, `config` for its accelerate config, `place` goes before what that says
    of this machine. What went wrong is printed by then. A process that was killed counts as CRASHED, and is named
    unless its pid is in `explained` by then. TOLD: one was ended by a signal that was passed on to it, as those in
    `told` were.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _set_environment(run)
    config = config or launch_config(run, settings)
    place_flags = [str(word) for name, value in place.items() if value is not None for word in (f"--{name}", value)]
    join_flags = ["--rdzv_conf", f"timeout={join_seconds}"] if join_seconds else []
    flags = ["--config_file", str(config), *_gpu_flags(config), *place_flags, *join_flags, "-m", module]
    parsed = launch_command_parser().parse_args([*flags, str(settings or run.folder / "run.yaml"), *arguments])
    parsed.signals_to_handle = "SIGQUIT"  # torch's own way with the others gives ranks 30 s, and prints tracebacks
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="fitune-") as parsed.log_dir:  # torch would leave a folder of its own
        try:
            launch_command(parsed)
        except ChildFailedError as error:
            return _first_failure(error.failures, told, explained)
        except (ValueError, FileNotFoundError, ConnectionError) as error:
            raise FituneError(f"accelerate launch refused {config}: {error}") from None
        except DistError:
            raise FituneError(
                "another machine was gone before the processes of all were started; what it says is printed there"
            ) from None
    return 0


def _gpu_flags(config: Path) -> list[str]:
    """Takes any GPUs where a run's file names some that are not here or are hidden, as `eval` may meet it."""
    gpu_ids = read_accelerate_config(config).gpu_ids
    missing = gpu_ids and this_machine().shown_by(gpu_ids).missing
    return ["--gpu_ids", "all"] if missing else []


def _first_failure(failures: dict, told: Collection[int], explained: Collection[int]) -> int:
    """The exit code that ended the run. A rank that was killed is named, it could not say so itself."""
    if told and failures.get(0) and failures[0].exitcode == -signal.SIGTERM:
        return TOLD  # rank 0, which speaks for all, had not begun to listen
    began = min(failure.timestamp for failure in failures.values())

    def order(item):
        code, when = item[1].exitcode, item[1].timestamp
        # torch's launcher sends SIGTERM to the others and half a minute later SIGKILL, and a rank whose neighbour is
        # gone crashes, or gloo aborts it
        follows = code == CRASHED, code == -signal.SIGABRT
        return when - began > 10, code == -signal.SIGTERM, code >= 0, *follows, when

    rank, first = min(failures.items(), key=order)
    if told and first.exitcode == -signal.SIGTERM:
        return TOLD  # on a machine without rank 0
    if len(told) > 1 and first.exitcode == -signal.SIGKILL:
        return CRASHED  # by the second signal, which was told
    if first.exitcode < 0:
        if first.pid not in explained:
            name = signal.Signals(-first.exitcode).name
            why = "; the kernel does that when host RAM runs out" if name == "SIGKILL" else ""
            say_while_training(f"error: rank {rank} (pid {first.pid}) was ended by {name}{why}")
        return CRASHED
    return first.exitcode


def _set_environment(run: Run) -> None:
    os.environ.update(python_path())
    if run.accelerate.use_cpu:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // run.accelerate.num_processes)))
    else:
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the numbers of nvidia-smi, by which plan chose
        let_segments_grow()
