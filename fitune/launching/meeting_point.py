"""Where ranks of several machines will meet: machine 0 listens there beforehand, and each machine tries to reach it.

By itself torch's store tries for a quarter of an hour where nobody answers, and prints a page for each try.
"""

import os
import socket

from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.launching.launch import Place

TRY_SECONDS = 5


class MeetingPoint:
    """An address of machine 0, and a port that is free there until ranks take it."""

    def __init__(self, host: str, port: int):
        self.host, self.port = host, port
        self.listener: socket.socket | None = None

    def open(self) -> None:
        """On machine 0. Raises UsageError where the port is taken."""
        try:
            both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
            self.listener = socket.create_server(("", self.port), **both)
        except OSError as error:
            why = os.strerror(error.errno)
            raise UsageError(
                f"--main-process-port {self.port}: {why} on machine 0; give all machines another port"
            ) from None

    def close(self) -> None:
        if self.listener:
            self.listener.close()

    def connect(self) -> socket.socket:
        """From here. Raises UsageError where nobody answers."""
        try:
            return socket.create_connection((self.host, self.port), timeout=TRY_SECONDS)
        except OSError as error:
            why = error.strerror or str(error)
            raise UsageError(
                f"machine 0 does not answer at {self.host}, port {self.port} ({why}): --main-process-ip is an address "
                "of machine 0 that all machines reach, --main-process-port a port that no firewall closes"
            ) from None

    def why_not_reached(self) -> str:
        """From here; '' where it is."""
        try:
            self.connect().close()
        except UsageError as error:
            return str(error)
        return ""


def meeting_point(run: Run, place: Place) -> MeetingPoint:
    """As the flags say, else the accelerate config."""
    config = run.accelerate
    return MeetingPoint(
        str(place["main_process_ip"] or config.main_process_ip),
        int(place["main_process_port"] or config.main_process_port),
    )
