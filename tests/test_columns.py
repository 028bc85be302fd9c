"""Names and what is said of them, on terminals of several widths and in a pipe."""

import re
import sys
from pathlib import Path

import pytest

from fitune.columns import beside

ROOT = Path(__file__).resolve().parents[1]
TEXT = "Four 24 GB GPUs, weights in host RAM, and a few words more than stand in one line of it."


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_on_a_terminal_no_line_is_longer_and_all_begin_behind_the_name(columns, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = beside("  fsdp_4gpu  ", TEXT).splitlines()
    assert max(map(len, lines)) <= columns and len(lines) == (1 if columns == 120 else 2)
    assert all(line.startswith(" " * 13) and line[13] != " " for line in lines[1:])
    assert " ".join(line[13:] for line in lines) == TEXT


def test_a_pipe_gets_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert beside("name ", TEXT) == f"name {TEXT}"


def test_no_text_has_a_colour_that_is_hard_to_read_on_white_or_on_black():
    """Yellow and cyan vanish on light terminals, blue on dark ones: bars may be of any colour, words may not."""
    found = set()
    for file in (ROOT / "fitune").rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        found |= {(file.name, words) for words in re.findall(r'(?:style|fg)="([a-z_ ]+)"', source)}
        found |= {(file.name, words) for words in re.findall(r'Part\(\w+, "([a-z ]*)"', source)}
    assert ("live_line.py", "dim") in found and ("doctor.py", "green") in found
    readable = {"bold", "dim", "italic", "green", "red", "magenta"}
    assert not [(file, words) for file, words in found if set(words.split()) - readable]
