"""What a terminal shows: a name and what is said of it, in columns; short paths; texts that change nothing else."""

import os
import shutil
import sys
import textwrap
import unicodedata

NARROW = 40
"On less than this there is no use in columns."

IN_A_PIPE = 120
"Of what has columns, in a pipe or a file."


def columns() -> int:
    """Of the terminal that stdout is."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else IN_A_PIPE


def beside(name: str, text: str) -> str:
    """`text` begins behind `name`; on a terminal its further lines begin there too. A pipe gets one line."""
    indent = " " * len(name)
    width = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or width - len(name) < NARROW:
        return name + text
    lines = textwrap.wrap(text, width - len(name), break_long_words=False, break_on_hyphens=False)
    return "\n".join([name + "".join(lines[:1]), *(indent + line for line in lines[1:])])


def printable(text: str) -> str:
    """A text of a model or a row for the terminal: what would move the cursor or change colours stands as `�`."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Zl", "Zp") else "�"
        for character in text
    )


def short(path: str) -> str:
    """Relative to the current folder where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) and not relative.startswith("..") else os.path.normpath(path)
