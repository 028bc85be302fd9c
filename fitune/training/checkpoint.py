"""A run's checkpoints: written while training goes on, each whole under its name or not there at all.

    checkpoints/.checkpoint-N.partial    while it is written
    checkpoints/checkpoint-N             once the disk has all of it, manifest.json last

With the profile's `async_save` each rank copies what it saves to host RAM and trains on; a thread of it writes and
hashes the copy, then meets the other ranks' threads in a process group of their own. Without, training waits for the
same steps, and nothing is copied. torch.distributed.checkpoint's async_save would do the first half; its metadata are a
pickle, its files have no hashes, and it knows no name that appears when all is there.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from fitune.config.command_name import command
from fitune.config.schema import Run
from fitune.errors import FituneError
from fitune.launching.heartbeat import Heartbeat
from fitune.output_folder import checkpoints, remove, rename_when_whole
from fitune.training.distributed import from_all_ranks, is_main_process
from fitune.training.manifest import Identity, SavedFile, describe, write_manifest

LONGEST_SAVE = timedelta(days=1)
"How long threads wait for each other. A rank that hangs is found sooner: training waits for the save before the next."
LOOK_SECONDS = 0.1

Writer = Callable[[], dict[str, str | None]]
"Writes this rank's files of a checkpoint; returns their SHA-256, where it is known, by path inside the checkpoint."


@dataclass(frozen=True)
class Save:
    """One checkpoint on its way to the disk."""

    step: int
    folder: Path
    "Its temporary name."
    write: Writer
    kept_steps: Collection[int]
    "Older checkpoints that stay, whatever `save_total_limit` says."


class CheckpointSaver(TrainerCallback):
    """Saves checkpoints one after the other, each in the background if `async_save` says so."""

    def __init__(self, run: Run, identity: Identity | None, heartbeat: Heartbeat):
        self.run, self.identity, self.heartbeat = run, identity, heartbeat
        self.folder = run.folder / "checkpoints"
        self.newest: int | None = None
        "The step of the newest checkpoint that this process wrote and that is whole."
        self._step = 0
        self._under_way: Future | None = None
        self._group: dist.ProcessGroup | None = None
        self._waits_for_others = threading.Event()

    def save(
        self, step: int, prepare: Callable[[Path, bool], Writer], kept_steps: Collection[int], *, is_last: bool
    ) -> None:
        """Call on all ranks. `prepare(folder, copied)` fills in what is small and returns what writes the rest.

        `copied`: training goes on while that writes. The last save of a run is waited for at once, so nothing is
        copied. Raises FituneError on all ranks if this save, or the one before, failed on one.
        """
        self.finish()
        self._step, in_background = step, self.run.profile.saves_async and not is_last
        with self.heartbeat.using_files():
            partial = self.folder / f".checkpoint-{step}.partial"
            self._on_all_ranks(lambda: _make_empty(partial) if is_main_process() else None)
            writers = []
            self._on_all_ranks(lambda: writers.append(prepare(partial, in_background)))
            save = Save(step, partial, writers[0], kept_steps)
            if in_background:
                self._start(save)
            else:
                self._complete(save)

    def finish(self) -> None:
        """Waits until the save that is under way is whole. Raises FituneError if it failed. Call on all ranks."""
        if self._under_way is None:
            return
        under_way, self._under_way = self._under_way, None
        with self.heartbeat.using_files():
            while not under_way.done():
                if self._waits_for_others.is_set():
                    with self.heartbeat.waiting():
                        _look_at(under_way, self._waits_for_others.is_set)
                else:
                    _look_at(under_way, lambda: not self._waits_for_others.is_set())
        under_way.result()

    @contextmanager
    def finished(self):
        """The save that is under way when training ends, or is ended by a FituneError on all ranks, is completed.

        Any other error leaves it: a rank that is gone cannot take part, and the checkpoints before it are whole.
        """
        try:
            yield
        except FituneError:
            with suppress(FituneError, RuntimeError):
                self.finish()
            raise
        self.finish()

    def on_step_end(self, args, state, control, **kwargs):
        """A disk that failed stops the run at the next step, on all ranks at once."""
        if self._under_way is None:
            return
        is_done = torch.tensor([int(self._under_way.done())])
        dist.all_reduce(is_done, dist.ReduceOp.MIN)
        if is_done.item():
            self.finish()

    def _start(self, save: Save) -> None:
        """In a thread that ends with the process: what it has not finished then was never a checkpoint."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=LONGEST_SAVE)
        self._under_way = under_way = Future()

        def complete() -> None:
            try:
                self._complete(save, self._group)
                under_way.set_result(None)
            except BaseException as error:
                under_way.set_exception(error)

        threading.Thread(target=complete, daemon=True, name=f"checkpoint-{save.step}").start()

    def _complete(self, save: Save, group: dist.ProcessGroup | None = None) -> None:
        """Each rank's files, then rank 0's part. Call on all ranks, or on all of `group`."""
        saved = self._on_all_ranks(lambda: _written(save), group)
        files = {name: file for part in saved for name, file in part.items()}
        self._on_all_ranks(lambda: self._name(save, files) if is_main_process() else None, group)
        self.newest = save.step

    def _name(self, save: Save, files: dict[str, SavedFile]) -> None:
        """The manifest, then the checkpoint's name, then older checkpoints make room."""
        write_manifest(save.folder, save.step, self.run, self.identity, files)
        rename_when_whole(save.folder, self.folder / f"checkpoint-{save.step}", replace=True)
        _remove_old(self.folder, self.run.recipe.training.get("save_total_limit"), save.kept_steps)

    def _on_all_ranks(self, work: Callable, group: dist.ProcessGroup | None = None) -> list:
        """What `work()` returned on each rank; FituneError on all of them where the disk failed on one."""
        try:
            own, error = work(), None
        except (OSError, FituneError) as caught:
            own, error = None, str(caught)
        found = from_all_ranks((own, error), lambda: self._waiting(group), group)
        if error := next((error for _, error in found if error), None):
            raise FituneError(
                f"step {self._step} was not saved in {self.folder}: {error}; the checkpoints before it are whole: "
                f"make room, then go on with: {command('train', '--resume', self.run.folder)}"
            )
        return [own for own, _ in found]

    @contextmanager
    def _waiting(self, group: dist.ProcessGroup | None):
        """For other ranks; a thread says so to the one that trains, which may be waiting for it."""
        if group is None:
            with self.heartbeat.waiting():
                yield
            return
        self._waits_for_others.set()
        yield
        self._waits_for_others.clear()


def _look_at(under_way: Future, is_so: Callable[[], bool]) -> None:
    """Until it is over, or something is no longer so."""
    while is_so() and not under_way.done():
        wait([under_way], LOOK_SECONDS)


def _written(save: Save) -> dict[str, SavedFile]:
    return {name: describe(save.folder / name, sha256) for name, sha256 in save.write().items()}


def _make_empty(folder: Path) -> None:
    remove(folder)
    folder.mkdir(parents=True)


@contextmanager
def disk_errors_named(folder: Path):
    """OSError where torch.save, on a disk that is full or broken, says only that its archive is."""
    try:
        yield
    except RuntimeError as error:
        code = errno.ENOSPC if shutil.disk_usage(folder).free < 2**20 else errno.EIO
        raise OSError(code, os.strerror(code), str(folder)) from error


def set_aside(folder: Path, damaged: list[Path]) -> None:
    """Renames what a run that resumes has skipped: it must not be counted among the checkpoints that are kept.

    Removes what interrupted saves left in `folder`. Main process only.
    """
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        remove(aside)
        path.rename(aside)
    for partial in folder.glob(".checkpoint-*.partial*"):
        remove(partial)


def _remove_old(folder: Path, limit: int | None, kept_steps: Collection[int] = ()) -> None:
    """Keeps the newest `limit` checkpoints, which are whole by now, and those of `kept_steps`; all without a limit."""
    kept = {f"checkpoint-{step}" for step in kept_steps}
    for path in checkpoints(folder)[: -limit if limit and limit > 0 else 0]:
        if path.name not in kept:
            remove(path)
