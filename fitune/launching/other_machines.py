"""While ranks run: another machine that ended or died is noticed, and the ranks here, which wait for it, are ended.

Until all ranks have read the base they wait for each other without a timeout. A machine leaves N.json in the folder
when it starts and touches it; N.failed or N.stopped is what it leaves when it ends otherwise than by finishing the run.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fitune.errors import FituneError, Interrupted
from fitune.launching.signs_of_life import seconds_silent

LOOK_SECONDS = 5
FOLLOWS_WITHIN_SECONDS = 60
"What ended another machine mostly ends the ranks here too, which say it themselves: they are given time."
GONE_SECONDS = 600
"Without a sign of life; a shared disk may be away for minutes while ranks compute."
FAILED, STOPPED = "failed", "stopped"
"How a machine ended, as its file is called."


class OtherMachines(threading.Thread):
    """A context manager around the ranks of one machine: `end_ranks(why)` is called once another machine is gone.

    It is called again with each look, since ranks may still be starting. `names` are all machines', by rank, as they
    began together in `session`.
    """

    def __init__(
        self, folder: Path, rank: int, names: list[str], session: str, end_ranks: Callable[[FituneError], None]
    ):
        super().__init__(daemon=True)
        self.folder, self.rank, self.names, self.session, self.end_ranks = folder, rank, names, session, end_ranks
        self._over = threading.Event()
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
                self.end_ranks(why)

    def _look(self, now: float) -> FituneError | None:
        """Why the ranks here cannot go on."""
        gone = {rank: why for rank in range(len(self.names)) if rank != self.rank and (why := self._why_gone(rank))}
        self._gone_since = {rank: self._gone_since.get(rank, now) for rank in gone}
        for rank, since in self._gone_since.items():
            if now - since >= FOLLOWS_WITHIN_SECONDS:
                said = f"machine {rank} of {len(self.names)} {gone[rank]}; the ranks here were ended"
                return Interrupted(said) if gone[rank] == TOLD_TO_STOP else FituneError(said)
        return None

    def _why_gone(self, rank: int) -> str:
        """In words; '' for one that lives, or has finished the run."""
        file = sign_file(self.folder, rank)
        for how, words in ((FAILED, ENDED_WITH_AN_ERROR), (STOPPED, TOLD_TO_STOP)):
            if shown(file.with_suffix(f".{how}")).get("session") == self.session:
                return words
        if shown(file).get("name") not in (None, self.names[rank]):
            return "was started again"
        try:
            silent = seconds_silent(file)
        except OSError:
            return ""  # it has finished, or the disk is away
        return f"has shown no sign of life for {silent:.0f} s" if silent > GONE_SECONDS else ""


ENDED_WITH_AN_ERROR, TOLD_TO_STOP = "ended with an error, which is printed there", "was told to stop"


def sign_file(folder: Path, rank: int) -> Path:
    """What a machine touches while it lives."""
    return folder / f"{rank}.json"


def shown(file: Path) -> dict:
    """What a machine's file says; nothing where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
