"""Names and what is said of them, on terminals of several widths and in a pipe."""

import sys

import pytest

from fitune.columns import beside

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
