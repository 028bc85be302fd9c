"""README's picture of the terminal shows what `plan` prints today, and how the script takes it from a terminal."""

import html
import importlib.util
import re
from pathlib import Path

from click.testing import CliRunner

from fitune.cli import cli

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "terminal.py"


def script():
    spec = importlib.util.spec_from_file_location("terminal_picture", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(svg: str) -> str:
    """The picture's text, a line for each of its lines."""
    at: dict[float, list[tuple[float, str]]] = {}
    for x, y, text in re.findall(r'<text class="fitune-r\d+" x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', svg):
        at.setdefault(float(y), []).append((float(x), html.unescape(text).replace("\xa0", " ")))
    return "\n".join(" ".join(text for _, text in sorted(parts)).rstrip() for _, parts in sorted(at.items()))


def test_the_picture_shows_what_plan_prints_now():
    module = script()
    picture = module.PICTURE.read_text(encoding="utf-8")
    planned = CliRunner().invoke(cli, module.PLAN).output
    seen = " ".join(shown(picture).split())
    for line in planned.splitlines():
        words = " ".join(re.sub(r"[█▌▶░]", "", line).split())
        assert words in re.sub(r" ?[█▌▶░]+", "", seen), f"{words}: run python docs/terminal.py"
    assert "accelerate launch --config_file accelerate_configs/cpu_2proc.yaml" in seen
    assert re.search(r"step 6\d/100 loss \d\.\d{4} ↓\d\.\d{3} lr .* tokens/s .* left checkpoint 50", seen)


def test_the_picture_needs_no_network():
    picture = script().PICTURE.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[\w./-]+", picture)) <= {"http://www.w3.org/2000/svg", "https://www.textualize.io"}
    assert "@font-face" not in picture


def test_a_moment_has_the_lines_printed_by_then_and_its_live_line():
    module = script()
    clear = module.CLEAR_LINE
    raw = f"before\n{clear}step 1/9{clear}first\nsecond\n\x1b[1mstep 2/9\x1b[0m{clear}third\nstep 3/9"
    moment = re.compile("step 2/9")
    assert module.at_moment(raw, moment) == ["before", "first", "second", "\x1b[1mstep 2/9\x1b[0m"]
    assert "first" in shown(module.svg(module.at_moment(raw, moment)))
