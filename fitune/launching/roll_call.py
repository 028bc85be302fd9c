"""Several machines that `eval` or `generate`: each tells machine 0 that it is there, then their ranks start together.

They meet at the port that their ranks will take, and stay connected. By itself torch would try for a quarter of an
hour, and print a page.
"""

import socket
import time
from contextlib import ExitStack, closing, suppress

from fitune.config.schema import Run
from fitune.errors import FituneError, UsageError
from fitune.launching.launch import Place, launch_until_stopped
from fitune.launching.links import Links, has_something_to_say, heard
from fitune.launching.meeting_point import TRY_SECONDS, MeetingPoint, meeting_point
from fitune.launching.waiting import PATIENCE_SECONDS, WaitingLine, named

START = b"start\n"


def launch_together(run: Run, module: str, *arguments: str, place: Place, **options) -> int:
    """`launch_until_stopped` once all machines are there; each is told how the others ended."""
    with meet(run, place) as others:
        code = launch_until_stopped(run, module, *arguments, place=place, beside=others.beside, **options)
        others.ended_with(code)
    return code


def meet(run: Run, place: Place) -> Links:
    """Returns when all machines of the run are there; at once where there is one, which is linked to none.

    Raises UsageError for an address where machine 0 does not answer, FituneError for machines that do not come.
    """
    machines, rank = run.accelerate.num_machines, int(place["machine_rank"] or 0)
    if machines == 1:
        return Links({}, machines)
    at = meeting_point(run, place)
    return Links({0: _tell_machine_0(at, rank, machines)} if rank else _call_the_roll(at, machines), machines)


def _call_the_roll(at: MeetingPoint, machines: int) -> dict[int, socket.socket]:
    """On machine 0: until each of the others has said its number. The connections to them."""
    with closing(at), ExitStack() as stack:
        at.open()
        at.connect().close()  # refuses an address that does not lead here
        at.listener.settimeout(1)
        line, here = WaitingLine(), {}
        while missing := [rank for rank in range(1, machines) if rank not in here or _is_gone(here[rank])]:
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
            rank, left = _number_of(connection, machines), connection
            if rank in here and not _is_gone(here[rank]):
                raise UsageError(f"two machines say --machine-rank {rank}; give each its own, 0 to {machines - 1}")
            if rank:
                left, here[rank] = here.get(rank), connection
            if left:
                left.close()
        for connection in here.values():
            with suppress(OSError):  # it has just ended; its ranks are missed then
                connection.sendall(START)
        stack.pop_all()
        return here


def _tell_machine_0(at: MeetingPoint, rank: int, machines: int) -> socket.socket:
    """On another machine: until machine 0 has seen all. The connection to it."""
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
    with ExitStack() as stack:
        stack.enter_context(connection)
        connection.settimeout(PATIENCE_SECONDS + TRY_SECONDS)
        with suppress(OSError):  # it has just ended, and says nothing
            connection.sendall(_greeting(rank, machines))
        said = heard(connection)
        if said == START:
            stack.pop_all()
            return connection
    if said:
        raise UsageError(f"{at.host}, port {at.port}: another program answers there; give all another port")
    raise FituneError("machine 0 ended before all machines had come, or runs already; what it says is printed there")


def _greeting(rank: int, machines: int) -> bytes:
    return f"machine {rank} of {machines}\n".encode()


def _number_of(connection: socket.socket, machines: int) -> int | None:
    """The rank that is told; None for whoever is no machine of this run."""
    connection.settimeout(TRY_SECONDS)
    said = heard(connection)
    return next((rank for rank in range(1, machines) if said == _greeting(rank, machines)), None)


def _is_gone(connection: socket.socket) -> bool:
    return has_something_to_say(connection)  # nothing is left to say
