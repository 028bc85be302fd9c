"""The errors a user is meant to read: one line that says what was given, what is allowed, what to type next."""

from difflib import get_close_matches


class FituneError(Exception):
    """A run that cannot go on. `cli.py` prints the message without a traceback and exits with `exit_code`."""

    exit_code = 1


class UsageError(FituneError):
    """The caller gave something wrong: a path, a name, a key, a value."""

    exit_code = 2


def nearest(given: str, allowed) -> str:
    """`; did you mean 'x'?` for a likely typo, else the list of what is allowed."""
    allowed = [str(name) for name in allowed]
    match = get_close_matches(str(given), allowed, n=1, cutoff=0.6)
    if match:
        return f"; did you mean '{match[0]}'?"
    return f"; allowed: {', '.join(sorted(allowed))}" if len(allowed) <= 20 else ""
