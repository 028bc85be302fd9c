"""What `generate` is asked on the command line, and how its answers are shown."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fitune.columns import printable

Asked = tuple[list[dict] | str, list | None]
"A conversation up to the turn that is wanted, and the tools that may be called in it; or a text to go on with."


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fitune.training.generate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--text", action="append", default=[], help="go on with this text, without a template")
    parser.add_argument("--test", type=int, default=0, help="ask the first N held-out prompts")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    parser.add_argument("--seed", type=int, help="draws the same answers again")
    parser.add_argument("--force", action="store_true", help="on a base that may not be the adapter's own, too")
    parser.add_argument("--checkpoint", help="a checkpoint of the run, instead of its result")
    parser.add_argument("--held-by", type=Path, help="the accelerate config that starts it, if it is not the run's")
    parser.add_argument("--json", type=Path, help="also write the answers to this file")
    return parser.parse_args(arguments)


def questions(options: argparse.Namespace, system_message: str | None) -> list[Asked]:
    """What --prompt and --text say."""
    start = [{"role": "system", "content": system_message}] if system_message else []
    prompts = [[*start, {"role": "user", "content": prompt}] for prompt in options.prompt]
    return [(asked, None) for asked in (*prompts, *options.text)]


def report(conversations: list[Asked], answers: dict[str, list[str]], json_file: Path | None) -> None:
    """Prints who answered what, by the name of the model, side by side; and writes it to a file."""
    table = Table(show_lines=True)
    for column in ("prompt", *answers):
        table.add_column(column, overflow="fold")
    for i, (asked, _) in enumerate(conversations):
        question = asked if isinstance(asked, str) else asked[-1]["content"]
        table.add_row(*map(printable, (question, *(texts[i] for texts in answers.values()))))
    Console().print(table, markup=False)
    if json_file:
        rows = [
            ({"text": asked} if isinstance(asked, str) else {"messages": asked})
            | ({"tools": tools} if tools else {})
            | {label: texts[i] for label, texts in answers.items()}
            for i, (asked, tools) in enumerate(conversations)
        ]
        json_file.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
