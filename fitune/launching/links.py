"""Machines that evaluate or generate together stay connected while their ranks run: one that is gone is noticed.

Each has a connection to machine 0. What a machine says on it at its end is how it ended; the system closes that of one
that dies without a word, and gives it up where the other side no longer answers.
"""

import select
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress

from fitune.errors import FituneError
from fitune.launching.launch import Beside, alone
from fitune.launching.other_machines import GONE_SECONDS, IN_WORDS, OtherMachines, how_it_ended

TIMES_ASKED = 10
"Before the other side is given up; the system asks, which also keeps a firewall from forgetting the connection."


class Links:
    """This machine's connections to others, by their ranks. A context manager: its end is told on them."""

    def __init__(self, connections: Mapping[int, socket.socket], machines: int):
        self.connections, self.machines = dict(connections), machines
        self._code = 0

    def __enter__(self):
        seconds = GONE_SECONDS // TIMES_ASKED
        for connection in self.connections.values():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, TIMES_ASKED - 1)
        return self

    def __exit__(self, kind, *_):
        how = how_it_ended(kind, self._code)
        for connection in self.connections.values():
            with connection, suppress(OSError):  # it has ended before
                connection.sendall(f"{how}\n".encode())

    def ended_with(self, code: int) -> None:
        """The exit code of this machine's ranks."""
        self._code = code

    @property
    def beside(self) -> Beside:
        """Entered while ranks run, with what ends them: another machine that is gone ends them."""
        return self._noticed if self.connections else alone

    def _noticed(self, end_ranks: Callable[[FituneError], None]) -> "LinkedMachines":
        return LinkedMachines(self.connections, self.machines, end_ranks)


class LinkedMachines(OtherMachines):
    """Those at the other ends of `connections`, by rank."""

    def __init__(self, connections: dict[int, socket.socket], machines: int, end_ranks: Callable[[FituneError], None]):
        super().__init__(connections, machines, end_ranks)
        self.connections = connections
        self._said: dict[int, str] = {}

    def why_gone(self, rank: int) -> str:
        with suppress(OSError, ValueError):  # closed here: this machine has ended
            if rank not in self._said and has_something_to_say(self.connections[rank]):
                self._said[rank] = heard(self.connections[rank]).decode(errors="replace").strip()
        return IN_WORDS.get(self._said[rank], "is gone") if rank in self._said else ""


def heard(connection: socket.socket) -> bytes:
    """A line and no more, or what came of one; nothing where the other side is gone or silent."""
    said = b""
    try:
        while not said.endswith(b"\n") and len(said) < 100 and (part := connection.recv(1)):
            said += part
    except OSError:
        pass
    return said


def has_something_to_say(connection: socket.socket) -> bool:
    """Whether the other side has, or is gone."""
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable)
