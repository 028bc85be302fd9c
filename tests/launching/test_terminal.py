"""A real pseudo-terminal: what several processes print stands above the live line, each line whole."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

from patience import PATIENCE_SECONDS

sys.path.insert(0, str(Path(__file__).parent))

from terminals import ROOT, in_terminal, left_on_screen


def run_in_terminal(program: str, columns: int = 80, **environment: str) -> tuple[int, str]:
    return in_terminal(["-c", textwrap.dedent(program)], columns, **environment)


LIVE = """
    import os, subprocess, sys, time
    from fitune.environment import OUTPUT
    from fitune.launching.run_status import RunStatus
    from fitune.launching.terminal import run_shown

    with run_shown() as show:
        assert os.environ[OUTPUT] == "live"
        show("starting 2 processes", lambda: RunStatus(step=3, steps=9, loss=2.0))
        print("from this process")
        line, bar = "printf 'half '; sleep 0.2; echo whole", "printf '10%%\\\\r100%%\\\\n' >&2"
        subprocess.run(["sh", "-c", f"{line}; {bar}; printf last"])
        time.sleep(1.2)
    assert OUTPUT not in os.environ
    print("after it", sys.stdout.isatty())
"""


def test_what_anybody_prints_stands_above_the_live_line():
    code, raw = run_in_terminal(LIVE)
    assert code == 0, raw
    seen = left_on_screen(raw)
    assert sorted(seen[:3]) == sorted(["from this process", "half whole", "100%"])
    assert seen[3:] == ["last", "after it True", ""]
    assert raw.count("loss 2.0000") >= 2, "drawn again and again"


def test_a_terminal_without_a_size_is_taken_for_80_columns():
    code, raw = run_in_terminal(LIVE, columns=0)
    assert code == 0 and "step 3/9  loss 2.0000" in re.sub(r"\x1b\[[\d;]*m", "", raw)


def test_a_terminal_that_is_closed_does_not_end_the_run():
    code, _ = run_in_terminal(
        """
        import os, sys, time
        from fitune.launching import terminal
        from fitune.launching.run_status import RunStatus

        with terminal.run_shown() as show:
            show("training", RunStatus)
            screen = show.__self__
            os.dup2(os.open("/dev/full", os.O_WRONLY), screen.terminal)
            print("a line that nobody sees")
            time.sleep(1.2)
            assert screen.is_alive()
        """
    )
    assert code == 0


def test_before_training_the_live_line_says_what_is_done_and_for_how_long():
    program = """
        import time
        from fitune.launching.terminal import run_shown
        with run_shown() as show:
            show("starting 2 processes", lambda: None)
            time.sleep(1.2)
        """
    code, raw = run_in_terminal(program)
    shown = re.sub(r"\x1b\[[\d;]*m", "", raw)
    assert code == 0 and re.search(r"starting 2 processes  0:00:0\d", shown), raw
    assert not any(left_on_screen(raw))


def test_a_dumb_terminal_and_quiet_get_no_control_characters():
    program = """
        from fitune.launching.terminal import run_shown
        with run_shown(quiet={quiet}) as show:
            show("starting 2 processes", lambda: None)
        """
    assert run_in_terminal(program.format(quiet=False), TERM="dumb") == (0, "starting 2 processes\r\n")
    assert run_in_terminal(program.format(quiet=True)) == (0, "")


BAR = """
    from fitune.progress import bar
    with bar("reading", 3e9, in_bytes=True) as advance:
        advance(3e9)
    with bar("quantising", 2) as advance:
        advance(), advance("a name")
"""


def test_a_bar_says_which_of_its_two_times_is_which():
    code, raw = run_in_terminal(BAR)
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", raw)
    assert code == 0 and re.search(r"reading .*3\.0/3\.0 GB.* elapsed .* left", shown), raw
    assert re.search(r"quantising .*2/2 .* elapsed .* left", shown), raw


def test_a_bar_in_a_pipe_is_two_plain_lines():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BAR)], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0 and re.fullmatch(
        r"reading: 3\.0 GB\nreading: 3\.0 GB in 0\.0 s\nquantising\nquantising: 2 in 0\.0 s\n", done.stderr
    ), done.stderr
