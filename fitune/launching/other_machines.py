"""While ranks run: another machine that ended or died is noticed, and the ranks here, which wait for it, are ended.

Until all ranks have read the base they wait for each other without a timeout. What shows that a machine lives is a file
in the run's folder while it trains (`MachinesOfAFolder`), and a connection while it evaluates or generates
(`fitune.launching.links`).
"""

import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path

from fitune.errors import ENDED_BY_A_SIGNAL, INTERRUPTED, FituneError, Interrupted, say_while_training
from fitune.launching.signs_of_life import seconds_silent

LOOK_SECONDS = 5
FOLLOWS_WITHIN_SECONDS = 60
"What ended another machine mostly ends the ranks here too, which say it themselves: they are given time."
GONE_SECONDS = 600
"Without a sign of life; a shared disk may be away for minutes while ranks compute."
FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"
"How a machine ended."
ENDED_WITH_AN_ERROR, TOLD_TO_STOP = "ended with an error, which is printed there", "was told to stop"
IN_WORDS = {FINISHED: "", FAILED: ENDED_WITH_AN_ERROR, STOPPED: TOLD_TO_STOP}
"What is said of a machine that ended so, if anything."


def how_it_ended(kind: type[BaseException] | None, code: int) -> str:
    """Of a machine whose ranks ended with the exit code `code`, or that raised an exception of `kind` itself."""
    if kind:
        return FAILED if issubclass(kind, Exception) and not issubclass(kind, Interrupted) else STOPPED
    if code == INTERRUPTED or code >= ENDED_BY_A_SIGNAL:
        return STOPPED
    return FAILED if code else FINISHED


class OtherMachines(threading.Thread, ABC):
    """A context manager around the ranks of one machine: `end_ranks(why)` is called once another machine is gone.

    It is called again with each look, since ranks may still be starting; the reason is printed the first time.
    `others` are the ranks of those that are looked after, of `count` machines.
    """

    def __init__(self, others: Iterable[int], count: int, end_ranks: Callable[[FituneError], None]):
        super().__init__(daemon=True)
        self.others, self.count, self.end_ranks = list(others), count, end_ranks
        self._over, self._is_told = threading.Event(), False
        self._gone_since: dict[int, float] = {}

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._over.set()  # and is not waited for: the shared disk may be away

    def run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            why = self._look(time.monotonic())
            if why and not self._over.is_set():
                if not self._is_told:
                    say_while_training(f"{'stopped' if why.exit_code == INTERRUPTED else 'error'}: {why}")
                self._is_told = True
                self.end_ranks(why)

    def _look(self, now: float) -> FituneError | None:
        """Why the ranks here cannot go on."""
        gone = {rank: why for rank in self.others if (why := self.why_gone(rank))}
        self._gone_since = {rank: self._gone_since.get(rank, now) for rank in gone}
        for rank, since in self._gone_since.items():
            if now - since >= FOLLOWS_WITHIN_SECONDS:
                said = f"machine {rank} of {self.count} {gone[rank]}; the ranks here were ended"
                return Interrupted(said) if gone[rank] == TOLD_TO_STOP else FituneError(said)
        return None

    @abstractmethod
    def why_gone(self, rank: int) -> str:
        """In words; '' for one that lives, or has finished."""


class MachinesOfAFolder(OtherMachines):
    """Each leaves N.json in the folder when it starts and touches it; N.failed or N.stopped is what it leaves when it
    ends otherwise than by finishing the run.

    `names` are all machines', by rank, as they began together in `session`.
    """

    def __init__(
        self, folder: Path, rank: int, names: list[str], session: str, end_ranks: Callable[[FituneError], None]
    ):
        super().__init__([other for other in range(len(names)) if other != rank], len(names), end_ranks)
        self.folder, self.names, self.session = folder, names, session

    def why_gone(self, rank: int) -> str:
        file = sign_file(self.folder, rank)
        for how in (FAILED, STOPPED):
            if shown(file.with_suffix(f".{how}")).get("session") == self.session:
                return IN_WORDS[how]
        if shown(file).get("name") not in (None, self.names[rank]):
            return "was started again"
        try:
            silent = seconds_silent(file)
        except OSError:
            return ""  # it has finished, or the disk is away
        return f"has shown no sign of life for {silent:.0f} s" if silent > GONE_SECONDS else ""


def sign_file(folder: Path, rank: int) -> Path:
    """What a machine touches while it lives."""
    return folder / f"{rank}.json"


def shown(file: Path) -> dict:
    """What a machine's file says; nothing where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
