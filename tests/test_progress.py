"""The bar on a terminal of 80 columns."""

import io
import re

import pytest
from rich.console import Console

from fitune import progress


@pytest.mark.parametrize("in_bytes", [False, True])
def test_a_bar_is_one_line_in_80_columns(monkeypatch, in_bytes):
    drawn = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=drawn, force_terminal=True, width=80))
    monkeypatch.setattr(progress, "REDRAW_SECONDS", -1)
    with progress.bar("reading the base", 141_000_000_000, in_bytes=in_bytes) as advance:
        for _ in range(5):
            advance(100_000_000)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", drawn.getvalue()))
    shown = [line for line in lines if line.strip()]
    assert len(shown) >= 5
    colours = set(re.findall(r"\x1b\[([\d;]+)m", drawn.getvalue().replace("━", "").replace("╸", "").replace("╺", "")))
    assert not colours & {"31", "32", "33", "36"}, "words in colours that vanish on white or on black"
    assert all("reading the base" in line and line.rstrip().endswith("left") for line in shown), shown
