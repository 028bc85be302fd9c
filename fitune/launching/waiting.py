"""What is said while other machines are waited for, and for how long."""

import sys
import time

PATIENCE_SECONDS = 600
"How long a machine is waited for before it has shown itself at all: somebody types on each."
AGAIN_SECONDS = 60


class WaitingLine:
    """Who is waited for, on stderr: said at once, and again each minute."""

    def __init__(self):
        self._began, self._told = time.monotonic(), -AGAIN_SECONDS

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        if self.seconds - self._told >= AGAIN_SECONDS:
            self._told = self.seconds
            print(text, file=sys.stderr)


def named(ranks: list[int]) -> str:
    """Machines in words."""
    return f"machine{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
