"""What messages tell the user to type: the command as it was called."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fitune.cli import cli
from fitune.config import command_name

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nothing_called(monkeypatch):
    monkeypatch.setenv(command_name.COMMAND, "")  # so that it is restored afterwards
    monkeypatch.delenv(command_name.COMMAND)


@pytest.mark.parametrize(
    ("argv0", "typed"),
    [
        ("cli.py", "python cli.py"),
        ("/a folder/cli.py", "python '/a folder/cli.py'"),
        ("/usr/lib/python3/site-packages/fitune/__main__.py", "python -m fitune"),
    ],
)
def test_the_command_is_named_as_it_was_called(argv0, typed):
    assert command_name.remember(argv0) == typed == command_name.command()


def test_fitune_is_named_by_its_path_where_the_shell_does_not_find_it(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "fitune"
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(program.parent))
    assert command_name.remember(str(program)) == "fitune"
    monkeypatch.delenv(command_name.COMMAND)
    monkeypatch.setenv("PATH", "")
    assert command_name.remember(str(program)) == "bin/fitune"


def test_without_a_call_a_checkout_names_its_own_file():
    assert command_name.command() == "python cli.py"


def test_what_is_to_be_typed_can_be_copied_where_a_name_has_spaces():
    assert command_name.command("plan", Path("my models/mine")) == "python cli.py plan 'my models/mine'"


def test_no_message_puts_a_name_into_a_command_without_quotes():
    """`command(...)` is the one way: it quotes."""
    verbs = "|".join(cli.commands)
    pattern = re.compile(rf"(\{{command\(\)\}} |`)({verbs})\b[^`\"&]*\{{")
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in (ROOT / "fitune").rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert not found


def test_a_process_that_fitune_started_names_what_the_user_typed():
    command_name.remember("cli.py")
    assert command_name.remember("/somewhere/fitune/__main__.py") == "python cli.py"


@pytest.mark.parametrize(
    ("command", "typed"), [(["cli.py"], "python cli.py"), (["-m", "fitune"], "python -m fitune")], ids=["cli.py", "-m"]
)
def test_help_and_errors_say_what_was_typed(command, typed):
    environment = {key: value for key, value in os.environ.items() if key != command_name.COMMAND}

    def call(*arguments):
        line = [sys.executable, *command, *arguments]
        return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)

    shown = call("eval", "--help").stdout
    assert shown.startswith(f"Usage: {typed} eval") and f"\n  {typed} eval runs/" in shown
    assert call("eval", "nowhere").stderr.endswith(f"expected a run folder written by `{typed} train`\n")
