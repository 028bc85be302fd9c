"""Runs a function on N real processes that talk over gloo, as `accelerate launch` would start them.

The processes are forked from a server that has imported the heavy libraries once, so a test pays for the imports only
the first time. The rendezvous store lives in the test process on a port the system chose: two test runs side by side
cannot meet.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from patience import PATIENCE_SECONDS
from quick_python import warm_context
from torch.distributed.tensor import DTensor

from fitune.config.schema import Run
from fitune.data.dataset import load_tokenizer
from fitune.model.sharding import new_mesh
from fitune.training.distributed import join
from fitune.training.train import load_sharded_model, train

GRACE_SECONDS = 5
"How long the other processes may still run after one has failed: long enough to fail by themselves, and be shown."


def run_ranks(function: Callable, world_size: int, *args, timeout: float = PATIENCE_SECONDS) -> list[Any]:
    """`function(*args)` on each of `world_size` processes; their results by rank.

    `function` must be importable (module level), arguments and results picklable. Raises RuntimeError with the
    traceback and output of every process that failed or did not finish within `timeout` seconds.
    """
    store = dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=timeout), wait_for_workers=False)
    places = [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is served here, so rank 0 must not serve it
            "GLOO_SOCKET_IFNAME": "lo",
        }
        for rank in range(world_size)
    ]
    return _run(function, args, places, timeout)


def run_alone(function: Callable, *args, timeout: float = PATIENCE_SECONDS) -> Any:
    """`function(*args)` in a process of its own that knows of no others."""
    return _run(function, args, [{}], timeout)[0]


def sharded_model(run: Run):
    """(model, tokenizer) of `run` on the ranks that call this together: sharded, loaded, as training has it."""
    mesh = new_mesh("cpu", run) if dist.is_initialized() else join(run)
    base_folder = Path(run.recipe.base.model)
    tokenizer = load_tokenizer(run.recipe, base_folder)
    as_trained = {"fp8": run.profile.compute == "fp8", "keep_gathered": run.accelerate.keeps_gathered}
    return load_sharded_model(run, base_folder, tokenizer, mesh, **as_trained), tokenizer


def train_here(run: Run) -> None:
    """Trains `run` on the ranks that call this together."""
    run.folder.mkdir(parents=True, exist_ok=True)
    train(run)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter, a gradient or an optimizer's state from all ranks that hold a part of it. Call on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def memory_mib(key: str, *, forget_peak: bool = False) -> float:
    """MiB that this process holds (VmRSS), or held at most (VmHWM) since a call that forgot the peak (Linux)."""
    if forget_peak:
        ctypes.CDLL(None).malloc_trim(0)  # what is free would hide what is taken from it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _run(function: Callable, args: tuple, places: list[dict[str, str]], timeout: float) -> list[Any]:
    context = warm_context()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(
                target=_work,
                args=(function, args, place, folder / str(rank), timeout),
                daemon=True,
                name=f"rank {rank}",
            )
            for rank, place in enumerate(places)
        ]
        for process in processes:
            process.start()
        try:
            _wait_for(processes, timeout)
            failures = [_failure(p, folder / str(rank)) for rank, p in enumerate(processes) if p.exitcode != 0]
        finally:
            for process in processes:
                process.kill()
                process.join()
        if failures:
            raise RuntimeError("\n".join(failures))
        return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(len(processes))]


def _wait_for(processes: list, timeout: float) -> None:
    deadline = time.monotonic() + timeout + GRACE_SECONDS
    while running := [p for p in processes if p.exitcode is None]:
        if any(p.exitcode for p in processes):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not wait([p.sentinel for p in running], max(0, deadline - time.monotonic())):
            return


def _failure(process, path: Path) -> str:
    ending = "did not finish" if process.exitcode is None else f"exit code {process.exitcode}"
    shown = [
        file.read_text(errors="replace")
        for suffix in (".output", ".error")
        if (file := path.with_suffix(suffix)).exists()
    ]
    return f"{process.name}: {ending}\n{''.join(shown)[-8000:]}"


def _work(function: Callable, args: tuple, place: dict[str, str], path: Path, timeout: float) -> None:
    with path.with_suffix(".output").open("wb") as output, path.with_suffix(".error").open("w") as error:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        faulthandler.dump_traceback_later(timeout, file=error)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test process ends this one
        os.environ.update(place)
        try:
            torch.save(function(*args), path.with_suffix(".result"))
        except BaseException:
            error.write(traceback.format_exc())
            raise SystemExit(1) from None
        finally:
            faulthandler.cancel_dump_traceback_later()
            sys.stdout.flush()
            sys.stderr.flush()
