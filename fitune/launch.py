"""Starts a run's processes through `accelerate launch`, in this process so that they inherit the terminal."""

import logging
import os
import sys
from pathlib import Path

from fitune.config import Run
from fitune.errors import FituneError
from fitune.run import ROOT


def launch_line(run: Run, module: str, *arguments: str) -> list[str]:
    """The command that starts `module` on a run's folder, as typed in a shell."""
    config = ["accelerate", "launch", "--config_file", _short(run.accelerate.path)]
    return [*config, "-m", module, _short(str(run.folder / "run.yaml")), *arguments]


def launch(run: Run, module: str, *arguments: str, accelerate_flags: tuple[str, ...] = ()) -> int:
    """Runs `module` on all processes of a run and returns the exit code of the first one that failed (0: none).

    `accelerate_flags` override the config file, e.g. ("--machine_rank", "1"). What went wrong is printed by then.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _set_environment(run)
    flags = ["--config_file", run.accelerate.path, *accelerate_flags, "-m", module]
    parsed = launch_command_parser().parse_args([*flags, str(run.folder / "run.yaml"), *arguments])
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: rank {failure.global_rank} was ended by signal {-failure.exitcode}", file=sys.stderr)
            return 1
        return failure.exitcode
    except ValueError as error:
        raise FituneError(f"accelerate launch refused {run.accelerate.path}: {error}") from None
    return 0


def _set_environment(run: Run) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if run.accelerate.use_cpu:
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // run.accelerate.num_processes)))
    else:
        # segments that can grow leave no unusable gaps between a layer's weights and the next one's
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _short(path: str) -> str:
    """Relative to the current folder where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) and not relative.startswith("..") else str(Path(path))
