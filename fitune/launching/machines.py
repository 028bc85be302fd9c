"""Several machines that share a run's folder: they find each other there, get ready, and start together.

Machine 0 chooses the settings; the others take them from run.yaml, of a resume from resume.yaml. Each machine downloads
and checks on its own, for as long as it takes; only when all are ready are ranks started, so no timeout runs meanwhile.
A machine shows that it lives by RUN/machines/N.json, and leaves N.failed if it ends with an error: nobody waits for it
then, and a scheduler can tell a failed run from one that was only interrupted, which leaves N.stopped.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fitune.config import run as runs
from fitune.config.recipe_paths import absolute_paths
from fitune.config.schema import Run
from fitune.errors import FituneError, UsageError
from fitune.launching.meeting_point import MeetingPoint
from fitune.launching.other_machines import FAILED, FINISHED, STOPPED, MachinesOfAFolder, how_it_ended, shown, sign_file
from fitune.launching.run_folder import ASKED, SETTINGS
from fitune.launching.signs_of_life import LOST_SECONDS, SignsOfLife, seconds_silent
from fitune.launching.waiting import PATIENCE_SECONDS, WaitingLine, named

FOLDER = "machines"
NAMED_WITHIN_SECONDS = 60
"How long machine 0 may not reach its own address: Kubernetes makes its name known after it has started."
NO_RESTART_SECONDS = 5
"Machine 0 that is started again takes away what it had left before it shows itself: silent for so long is gone."


def check_machine_flags(
    run: Run, machine_rank: int | None, main_process_ip: str | None, main_process_port: int | None
) -> None:
    """Raises UsageError for machine flags that are missing or don't fit, before anything else is done."""
    machines, config = run.accelerate.num_machines, run.accelerate
    if machines == 1:
        if machine_rank or main_process_ip or main_process_port:
            raise UsageError(
                f"--machine-rank, --main-process-ip and --main-process-port are for several machines, {config.path} "
                f"has num_machines 1; leave them out, or train with --machines N or a profile for several"
            )
        return
    if machine_rank is not None and machine_rank >= machines:
        raise UsageError(f"--machine-rank {machine_rank}: there are {machines} machines, 0 to {machines - 1}")
    if not (main_process_ip or config.main_process_ip):
        raise UsageError(
            f"the run takes {machines} machines: give each of them --main-process-ip, the address of machine 0, and "
            f"--machine-rank, 0 to {machines - 1}"
        )
    if not (main_process_port or config.main_process_port):
        raise UsageError(f"the run takes {machines} machines: give each of them the same --main-process-port")


def refuse_machine_flags(
    given: Path, machine_rank: int | None, main_process_ip: str | None, main_process_port: int | None
) -> None:
    """Raises UsageError for machine flags beside what one machine does alone."""
    if machine_rank is not None or main_process_ip or main_process_port:
        raise UsageError(
            f"{given}: one machine does this alone; leave out --machine-rank, --main-process-ip and --main-process-port"
        )


class Machines:
    """This machine among those of a run. A context manager: it shows itself from its beginning to its end."""

    def __init__(self, run: Run, rank: int, resume: bool, at: MeetingPoint):
        self.resume = resume
        "Whether the run goes on: what machine 0 was told counts."
        self.at, self.not_reached = at, "not tried yet"
        "Where ranks will meet, and why it is not reached from here."
        self.folder, self.count, self.rank = run.folder / FOLDER, run.accelerate.num_machines, rank
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.session, self._signs, self._settings = "", None, None
        self._names: list[str] = []
        "All machines', once they start together."
        self._code = 0

    def __enter__(self):
        if self.rank == 0:
            self.at.open()
            self.session = uuid.uuid4().hex
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.iterdir():  # the folder stays: another machine may write into it just now
                with suppress(OSError):
                    left.unlink()
        else:
            first = self._machine_0()
            self.session, self.resume = first["session"], first["resume"]
            for how in (FAILED, STOPPED):  # it was stopped, and is started again while the others wait
                self._ended_file(self.rank, how).unlink(missing_ok=True)
        self._show(ready=False)
        self._signs = SignsOfLife(self._file(self.rank), lambda: True, lambda: None)
        self._signs.start()
        return self

    def __exit__(self, kind, *_):
        self.at.close()
        self._signs.stop()
        how = how_it_ended(kind, self._code)
        with suppress(OSError):
            if how == FINISHED:
                self._file(self.rank).unlink(missing_ok=True)
            else:
                self._file(self.rank).replace(self._ended_file(self.rank, how))

    def ended_with(self, code: int) -> None:
        """The exit code of this machine's ranks."""
        self._code = code

    def noticed_while_ranks_run(self, end_ranks: Callable[[FituneError], None]) -> MachinesOfAFolder:
        """A context manager: `end_ranks(why)` is called if one of the others is gone before the run is finished."""
        return MachinesOfAFolder(self.folder, self.rank, self._names, self.session, end_ranks)

    def settings_of_machine_0(self, asked: Run) -> Run:
        """The run that machine 0 wrote: its profile counts. Raises UsageError if it trains something else."""
        theirs = self._settings = self._load_settings()
        mine, wanted = (absolute_paths(run.recipe.model_dump()) for run in (asked, theirs))
        for key, value in mine.items():
            if wanted[key] != value:
                raise UsageError(
                    f"{asked.folder}: machine 0 has {key} {wanted[key]}, machine {self.rank} {value}; give all "
                    f"machines the same recipe and --set"
                )
        if theirs.accelerate.num_machines != self.count:
            raise UsageError(
                f"{asked.folder}: machine 0 starts {theirs.accelerate.num_machines} machines, machine "
                f"{self.rank} {self.count}; give all the same profile or --machines"
            )
        return theirs

    def start_together(self) -> None:
        """Returns when all machines are ready, however long one prepares.

        Raises FituneError naming those that don't answer.
        """
        line, silent_since = WaitingLine(), {}
        while missing := self._missing():
            ended = {rank: shown(self._ended_file(rank, FAILED)) for rank in missing}
            if failed := [rank for rank, sign in ended.items() if sign.get("session") == self.session]:
                raise FituneError(f"{named(failed)} of {self.count} ended with an error, which is printed there")
            waited = line.seconds
            if self.not_reached and waited > (PATIENCE_SECONDS if self.rank else NAMED_WITHIN_SECONDS):
                raise UsageError(self.not_reached)
            silent_since = {rank: silent_since.get(rank, waited) for rank in missing if not self._lives(rank)}
            silent = [rank for rank, since in silent_since.items() if waited - since >= NO_RESTART_SECONDS]
            if silent and waited > PATIENCE_SECONDS:
                raise FituneError(
                    f"{named(silent)} of {self.count} did not answer for {waited:.0f} s; start each with the same "
                    f"command and its own --machine-rank, in a folder that all machines share"
                )
            because = f": {self.not_reached}" if self.not_reached else ""
            line.say(f"waiting for {named(missing)} of {self.count}{because}")
            time.sleep(0.5)
        self.at.close()

    def _missing(self) -> list[int]:
        """Those that are not ready. Machine 0 sees it and tells the others by name: what it once left names none."""
        if self.not_reached:
            self.not_reached = self.at.why_not_reached()
            self._show(ready=not self.not_reached)
        if self.rank:
            self._follow_machine_0()
            first = self._read(0)
            self._names = [first.get("name"), *first.get("together", [])]
            return [] if self.name in self._names else [0]
        signs = {rank: self._read(rank) for rank in range(1, self.count)}
        missing = [rank for rank, one in signs.items() if not (one.get("session") == self.session and one.get("ready"))]
        if self.not_reached:
            return missing or [0]
        if not missing:
            self._names = [self.name, *(sign["name"] for sign in signs.values())]
            self._show(ready=True, together=self._names[1:])
        return missing

    def _follow_machine_0(self) -> None:
        """Machine 0 may have died, and this machine seen what it had left, before it was started again."""
        first = self._read(0)
        if first.get("session") in (None, self.session):
            return
        if self._settings != self._load_settings():
            raise FituneError(
                f"{self.folder.parent}: machine 0 was started again with other settings: start this machine again too"
            )
        self.session, self.resume = first["session"], first["resume"]
        self._show(ready=not self.not_reached)

    def _load_settings(self) -> Run:
        folder = self.folder.parent
        return runs.load(folder / (ASKED if (folder / ASKED).is_file() else SETTINGS))

    def _machine_0(self) -> dict:
        """What machine 0 shows, once it does."""
        began = time.monotonic()
        while not self._lives(0):
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise UsageError(
                    f"{self.folder.parent}: machine 0 did not show itself there for {PATIENCE_SECONDS} s; start "
                    f"it with the same --output, in a folder that all machines share"
                )
            time.sleep(0.5)
        return self._read(0)

    def _show(self, ready: bool, together: list[str] | None = None) -> None:
        sign = {"name": self.name, "session": self.session, "resume": self.resume, "ready": ready}
        partial = self.folder / f".{self.rank}.partial"
        partial.write_text(json.dumps(sign | {"together": together or []}), encoding="utf-8")
        partial.replace(self._file(self.rank))

    def _lives(self, rank: int) -> bool:
        with suppress(OSError):
            return "session" in self._read(rank) and seconds_silent(self._file(rank)) <= LOST_SECONDS
        return False

    def _read(self, rank: int) -> dict:
        return shown(self._file(rank))

    def _file(self, rank: int) -> Path:
        return sign_file(self.folder, rank)

    def _ended_file(self, rank: int, how: str) -> Path:
        return self._file(rank).with_suffix(f".{how}")
