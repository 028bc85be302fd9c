"""Draws docs/terminal.svg, README's picture of the terminal: `plan`, and a run of the tiny model while it trains.

python docs/terminal.py    # on a CPU, about a minute
"""

import io
import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.text import Text

from fitune.environment import COMMAND
from fitune.launching.terminal import CLEAR_LINE

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "terminal.svg"
COLUMNS, ROWS = 96, 50
PLAN = ["plan", "llama3_70b_qlora", "--gpu", "RTX-4090", "--gpus", "4", "--host-memory", "64", "--price-per-hour", "2"]
TRAIN = ["train", "tiny_qlora", "--profile", "cpu_2proc"]
MOMENT = re.compile(r"step 6[0-9]/100 .*checkpoint 50")
"Of the run: what its live line says when the picture is taken."


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for words in (["-m", "fitune.demo.tiny_base", "models/tiny-base"], ["-m", "fitune", "prepare", "tiny_qlora"]):
            subprocess.run(
                [sys.executable, *words], cwd=folder, env=environment(), check=True, stdout=subprocess.DEVNULL
            )
        planned, trained = (recorded(command, folder) for command in (PLAN, TRAIN))
    lines = [typed(PLAN), *planned.splitlines(), "", typed(TRAIN), *at_moment(trained, MOMENT)]
    PICTURE.write_text(svg(lines), encoding="utf-8")


def environment() -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    return plain | {"PYTHONPATH": str(ROOT), COMMAND: "fitune", "TERM": "xterm-256color"}


def typed(command: list[str]) -> str:
    return f"\x1b[1m$ fitune {shlex.join(command)}\x1b[0m"


def recorded(command: list[str], folder: str) -> str:
    """All that a command of fitune writes to a terminal."""
    data = bytearray()

    def read(terminal: int) -> bytes:
        part = os.read(terminal, 65536)
        data.extend(part)
        return part

    words = shlex.join([sys.executable, "-m", "fitune", *command])
    here, before = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment())
    try:
        pty.spawn(["sh", "-c", f"stty cols {COLUMNS} rows {ROWS}; exec {words}"], read)
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
    return data.decode().replace("\r\n", "\n").replace(f"{ROOT}/", "")


def at_moment(raw: str, moment: re.Pattern) -> list[str]:
    """What stands on the terminal when its live line first matches: the lines printed by then, and the live line."""
    printed = ""
    for drawn in raw.split(CLEAR_LINE):
        above, newline, live = drawn.rpartition("\n")
        printed += above + newline
        if moment.search(re.sub(r"\x1b\[[\d;]*m", "", live)):
            return [*printed.splitlines(), live]
    raise SystemExit(f"the live line never matched {moment.pattern}")


def svg(lines: list[str]) -> str:
    """Lines with a terminal's colours as a picture, without fonts from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), overflow="fold")
    picture = console.export_svg(title="fitune", unique_id="fitune")
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)


if __name__ == "__main__":
    main()
