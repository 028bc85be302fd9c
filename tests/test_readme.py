"""Every path and command that the README and the docs name exists."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MADE_LATER = ("runs/", "models/", "data/", "rows.jsonl", "adapter/", "model/")
"Paths that a command writes, or that stand for the reader's own."


def code(page: Path) -> list[str]:
    """Lines of the fenced blocks of a page."""
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    return [line.split("   #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def cli_lines() -> list[str]:
    lines = [line for page in PAGES for line in code(page)]
    return sorted({line for line in lines if re.match(r"((python |\./)cli\.py|fitune) ", line)})


@pytest.mark.parametrize("line", cli_lines())
def test_every_command_parses(line):
    from click import Context
    from click.exceptions import Exit

    from fitune.cli import cli

    words = re.findall(r'"[^"]*"|\S+', re.sub(r"^((python |\./)cli\.py|fitune) ", "", line))
    words = [word.strip('"') for word in words if not word.startswith(">")]
    name, *rest = words
    assert name in cli.commands, line
    with contextlib.suppress(Exit):
        cli.commands[name].make_context(name, rest, parent=Context(cli))


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, flags=re.M))
    named = {
        word
        for page in PAGES
        for word in re.findall(
            r"`?make ([a-z][a-z0-9-]*)",
            "\n".join([*code(page), *re.findall(r"`(make [a-z0-9-]+)", page.read_text(encoding="utf-8"))]),
        )
    }
    assert named and named <= targets


def test_every_train_target_resolves():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = re.findall(r"cli\.py train (\S+) --profile (\S+)", makefile)
    assert len(lines) >= 8
    from fitune.config.run import resolve

    for recipe, profile in lines:
        resolve(recipe, profile)


def test_the_tree_names_each_wing_once():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = next(block for block in re.findall(r"```\n(.*?)```", readme, flags=re.S) if "cli.py      " in block)
    named = [line.split()[0] for line in tree.splitlines()]
    for path in named:
        assert (ROOT / path).exists(), path
    wings = {f"fitune/{path.parent.name}/" for path in (ROOT / "fitune").glob("*/__init__.py")}
    assert sorted(name for name in named if name.startswith("fitune/")) == sorted(wings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_or_quoted_path_exists(page):
    text = page.read_text(encoding="utf-8")
    links = [
        target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target and not target.startswith("#")
    ]
    quoted = [word for word in re.findall(r"`([\w./*-]+/[\w./*-]*)`", text) if (ROOT / word.split("/")[0]).exists()]
    for target in links:
        assert (page.parent / target.split("#")[0]).exists(), target
    for word in quoted:
        assert word.startswith(MADE_LATER) or list(ROOT.glob(word.rstrip("/"))), word


def test_every_promise_has_its_test():
    promised = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(promised) > 10
    for file, test in promised:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_tables_are_generated_from_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
