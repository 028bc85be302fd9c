"""What README.md and the docs say, taken apart: lines of code, words in backticks, links."""

import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(page for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (page := ROOT / name).is_file()),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCED = re.compile(r"^```\w*\n(.*?)^```", flags=re.S | re.M)
PROGRAM = re.compile(r"^((?:\S+/)?python3? cli\.py|\./cli\.py|fitune|python -m fitune) ")


@dataclass(frozen=True)
class Command:
    """A call of fitune as a page shows it."""

    page: str
    words: tuple[str, ...]
    "Without the program's name."
    is_whole: bool
    "Whether it is meant to be typed as it is: a line of a block, or the program's name stands before it."

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code(page: Path) -> list[str]:
    """Lines of the fenced blocks of a page, without comments; a line that ends with a backslash goes on."""
    blocks = [block.replace("\\\n", " ") for block in FENCED.findall(text(page))]
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def quoted(page: Path) -> list[str]:
    """What stands in backticks in the running text."""
    return [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", FENCED.sub("", text(page)))]


def links(page: Path) -> list[str]:
    shown = FENCED.sub("", text(page))
    return re.findall(r"\]\(([^)\s]+)\)", shown) + re.findall(r' (?:src|srcset)="([^"]+)"', shown)


def headings(page: Path) -> set[str]:
    """The names by which a page's headings are linked to."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", text(page)), flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(names: set[str]) -> list[Command]:
    """Every call of one of fitune's commands, whole ones and those that the text only mentions, as `train --resume`."""
    found = []
    for page in PAGES:
        for line, in_block in [*((line, True) for line in code(page)), *((words, False) for words in quoted(page))]:
            for part in re.split(r" (?:&&|\|) ", line):
                program = PROGRAM.match(part)
                rest = PROGRAM.sub("", part)
                if (program and not rest.startswith("-")) or (
                    not in_block and " " in rest and rest.split()[0] in names and re.search(r" -|[A-Z]{3}", rest)
                ):
                    words = shlex.split(rest.split(" >")[0])
                    found.append(Command(page.name, tuple(words), bool(program)))
    return list(dict.fromkeys(found))


def settings() -> list[tuple[str, str]]:
    """(page, KEY=VALUE) of every `--set`, with fitune's name before it or alone."""
    found = []
    for page in PAGES:
        for line in [*code(page), *quoted(page)]:
            if "--set " not in line:
                continue
            words = shlex.split(line)
            found += [(page.name, value) for flag, value in pairwise(words) if flag == "--set"]
    return list(dict.fromkeys(pair for pair in found if not re.search(r"\bKEY=|^key=", pair[1])))


def keys_in(block: dict, prefix: str = "") -> list[str]:
    """Every key of a mapping and of those in it, with dots between."""
    keys = []
    for key, value in block.items():
        inner = isinstance(value, dict) and key != "lr_scheduler_kwargs"
        keys += [f"{prefix}{key}", *(keys_in(value, f"{prefix}{key}.") if inner else ())]
    return keys
