"""How the user called fitune, for the messages that say what to type next."""

import os
import shlex
import shutil
from pathlib import Path

from fitune.config.shipped import CHECKOUT
from fitune.environment import COMMAND


def remember(argv0: str) -> str:
    """Notes what `argv0`, Python's sys.argv[0], stands for: `fitune`, `python cli.py`, `python -m fitune`. Returns it.

    Where a stage of the demo is started, the command that it shows is remembered already.
    """
    if COMMAND in os.environ:
        return os.environ[COMMAND]
    name = Path(argv0).name
    if name == "__main__.py":
        typed = "python -m fitune"
    elif name.endswith(".py"):
        typed = f"python {shlex.quote(argv0)}"
    else:
        found = shutil.which(name)
        is_on_path = found and Path(found).resolve() == Path(argv0).resolve()
        typed = name if is_on_path else shlex.quote(os.path.relpath(argv0))
    os.environ[COMMAND] = typed
    return typed


def command(*words: str | Path) -> str:
    """What to type: fitune as it was called, else as it can be, and `words` as a shell takes them, spaces and all."""
    typed = os.environ.get(COMMAND) or ("python cli.py" if CHECKOUT else "fitune")
    return " ".join([typed, *(shlex.quote(str(word)) for word in words)])
