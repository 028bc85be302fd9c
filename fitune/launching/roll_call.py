"""Several machines that `eval` or `generate`: each tells machine 0 that it is there, then their ranks start together.

They meet at the port that their ranks will take. By itself torch would try for a quarter of an hour, and print a page.
"""

import select
import socket
import time
from contextlib import ExitStack, closing, suppress

from fitune.config.schema import Run
from fitune.errors import FituneError, UsageError
from fitune.launching.launch import Place
from fitune.launching.meeting_point import TRY_SECONDS, MeetingPoint, meeting_point
from fitune.launching.waiting import PATIENCE_SECONDS, WaitingLine, named

START = b"start\n"


def meet(run: Run, place: Place) -> None:
    """Returns when all machines of the run are there; at once where there is one.

    Raises UsageError for an address where machine 0 does not answer, FituneError for machines that do not come.
    """
    machines, rank = run.accelerate.num_machines, int(place["machine_rank"] or 0)
    if machines == 1:
        return
    at = meeting_point(run, place)
    if rank:
        _tell_machine_0(at, rank, machines)
    else:
        _call_the_roll(at, machines)


def _call_the_roll(at: MeetingPoint, machines: int) -> None:
    """On machine 0: until each of the others has said its number."""
    with closing(at), ExitStack() as stack:
        at.open()
        at.connect().close()  # refuses an address that does not lead here
        at.listener.settimeout(1)
        line, here = WaitingLine(), {}
        while missing := [rank for rank in range(1, machines) if rank not in here or _is_closed(here[rank])]:
            line.say(f"waiting for {named(missing)} of {machines}")
            if line.seconds > PATIENCE_SECONDS:
                raise FituneError(
                    f"{named(missing)} of {machines} did not come for {PATIENCE_SECONDS} s; type the same on each, "
                    "with its own --machine-rank"
                )
            try:
                connection = stack.enter_context(at.listener.accept()[0])
            except TimeoutError:
                continue
            rank = _number_of(connection, machines)
            if rank in here and not _is_closed(here[rank]):
                raise UsageError(f"two machines say --machine-rank {rank}; give each its own, 0 to {machines - 1}")
            if rank:
                here[rank] = connection
        for connection in here.values():
            with suppress(OSError):  # it has just ended; its ranks are missed then
                connection.sendall(START)
        for connection in here.values():
            _heard(connection)  # closed there first, or this port would rest for a minute


def _tell_machine_0(at: MeetingPoint, rank: int, machines: int) -> None:
    """On another machine: until machine 0 has seen all."""
    line = WaitingLine()
    while True:
        try:
            connection = at.connect()
            break
        except UsageError as error:
            if line.seconds > PATIENCE_SECONDS:
                raise
            line.say(f"waiting for machine 0 of {machines}: {error}")
            time.sleep(1)
    with connection:
        connection.sendall(_greeting(rank, machines))
        connection.settimeout(PATIENCE_SECONDS + TRY_SECONDS)
        said = _heard(connection)
    if said != START:
        if said:
            raise UsageError(f"{at.host}, port {at.port}: another program answers there; give all another port")
        raise FituneError(
            "machine 0 ended before all machines had come, or runs already; what it says is printed there"
        )


def _greeting(rank: int, machines: int) -> bytes:
    return f"machine {rank} of {machines}\n".encode()


def _number_of(connection: socket.socket, machines: int) -> int | None:
    """The rank that is told; None for whoever is no machine of this run."""
    connection.settimeout(TRY_SECONDS)
    said = _heard(connection)
    return next((rank for rank in range(1, machines) if said == _greeting(rank, machines)), None)


def _heard(connection: socket.socket) -> bytes:
    """A line, or what came of one; nothing where the other side is gone or silent."""
    said = b""
    try:
        while not said.endswith(b"\n") and len(said) < 100 and (part := connection.recv(100)):
            said += part
    except OSError:
        pass
    return said


def _is_closed(connection: socket.socket) -> bool:
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable)  # it has nothing more to say
