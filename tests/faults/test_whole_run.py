"""A whole run as a user starts it, each process a Python of its own: what it prints, leaves and keeps to itself."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from patience import PATIENCE_SECONDS

sys.path.insert(0, str(Path(__file__).parent))

from commands import ROOT, losses, train_command

CANARY = "hf_canaryCanaryCanaryCanaryCanary12"


@dataclass
class WholeRun:
    place: Path
    "Where all of it happened; `mine` in it is the user's, `link` leads there, `elsewhere` is not to be changed."
    folder: Path
    "Of the run."
    printed: dict[str, tuple[str, str]]
    "Each command's stdout and stderr."
    arguments: dict[str, set[str]]
    "Of each command and all processes below it."
    changed: list[Path]
    "Folders that are not the run's own in which a file has changed."


@pytest.fixture(scope="module")
def whole_run(tiny_base, prepared, tmp_path_factory) -> WholeRun:
    """`prepare`, `train` (four steps, a checkpoint after each) and `merge`, with a token in the environment."""
    place = tmp_path_factory.mktemp("whole")
    for name in ("home", "tmp", "elsewhere", "mine"):
        (place / name).mkdir()
    (place / "elsewhere/precious").write_text("1")
    (place / "link").symlink_to("mine")
    (place / "mine/out").symlink_to(place / "elsewhere")
    environment = os.environ | {"HF_TOKEN": CANARY, "HOME": str(place / "home"), "TMPDIR": str(place / "tmp")}
    before = {folder: _files(folder) for folder in (ROOT, tiny_base, prepared, place / "elsewhere")}
    data, folder = place / "link/data", place / "mine/../link/run"
    python = [sys.executable, "cli.py"]
    rows = ["--dataset", str(prepared / "train.jsonl"), "--tokenizer", str(tiny_base), "--template", "llama3"]
    commands = {
        "prepare": [*python, "prepare", *rows, "--output", str(data), "--max-length", "256"],
        "train": train_command(tiny_base, data, folder, 4),
        "merge": [*python, "merge", str(folder), "--output", str(place / "link/merged")],
    }
    printed, arguments = {}, {}
    for name, command in commands.items():
        printed[name], arguments[name] = _run(command, environment)
    changed = [folder for folder, files in before.items() if _files(folder) != files]
    return WholeRun(place, folder, printed, arguments, changed)


def _files(folder: Path) -> dict[str, str]:
    """Every file under `folder`, links not followed, with a hash of its contents; what git ignores is left out."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not {".git", "__pycache__", ".venv", ".pytest_cache", ".ruff_cache"} & set(path.parts):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _run(command: list[str], environment: dict) -> tuple[tuple[str, str], set[str]]:
    """(what a command printed, the arguments of all processes below it)."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
    arguments, over = set(), threading.Event()

    def watch():
        while not over.wait(0.1):
            try:
                for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                    arguments.update(child.cmdline())
            except psutil.Error:
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    over.set()
    thread.join()
    assert process.returncode == 0, err[-3000:]
    return (out, err), arguments


def test_a_whole_run_leaks_no_token_and_writes_only_where_it_was_told(whole_run):
    for name, arguments in whole_run.arguments.items():
        assert CANARY not in "".join(whole_run.printed[name])
        assert len(arguments) > 3 and not any(CANARY in argument for argument in arguments)
    written = _files(whole_run.place)
    assert {"mine/run/adapter/adapter_model.safetensors", "mine/merged/model.safetensors"} <= set(written)
    assert not [name for name in written if CANARY.encode() in (whole_run.place / name).read_bytes()]
    assert not whole_run.changed
    strangers = [name for name in written if not name.startswith(("mine/", "home/.cache/", "elsewhere/precious"))]
    assert not strangers
    assert not list((whole_run.place / "tmp").iterdir())


def test_in_a_pipe_a_run_prints_plain_lines_and_no_others(whole_run):
    out, err = whole_run.printed["train"]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out + err)
    number = r" +[\d.,e+-]+"
    row = rf" +\d/4{number}{number}{number}({number})?( +\d:\d\d:\d\d)?"
    lines = [
        r"data: .*/data, prepared from .*/train\.jsonl",
        "accelerate launch .*",
        " +step +loss +grad norm +learning rate +tokens/s +left",
        *[row] * 4,
        r"trained 4 steps in \d:\d\d:\d\d",
        "result: .*/adapter",
        r"curve:  .*/loss\.png",
        "next:   python cli.py eval .*",
    ]
    for line, expected in zip(out.splitlines(), lines, strict=True):
        assert re.fullmatch(expected, line), line
    stages = [
        "checking tiny_qlora on cpu_2proc: memory, base, rows",
        "starting 2 processes",
        "joining 2 processes",
        "checking the base and the rows",
        r"reading the base: [\d.]+ MB",
        r"reading the base: [\d.]+ MB in .*",
        "mapping the rows",
        "training 4 steps",
        "comparing what was written with what was trained",
        r"page:   .*/report\.html",
    ]
    for line, expected in zip(err.splitlines(), stages, strict=True):
        assert re.fullmatch(expected, line), line


def test_a_run_leaves_what_the_readme_promises(whole_run):
    finished = whole_run.folder
    assert len(losses(finished)) == 4
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {
        path.name for path in (finished / "adapter").iterdir()
    }
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "report.html").read_text()
    assert "finished after 4 steps" in page and "Gradient norm" in page
    origin = json.loads((finished / "origin.json").read_text())
    assert " train tiny_qlora " in origin["starts"][0]["typed"] and len(origin["identity"]["data"]) == 64
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert all(line["tokens_per_second"] > 0 for line in lines if "loss" in line and line["step"] > 1)
    measured = json.loads((finished / "measurements.json").read_text())
    assert len(measured["ranks"]) == 2 and measured["tokens_per_second"] > 0
    assert all(rank["loading"]["read_gib"] > 0 for rank in measured["ranks"])
    assert measured["optimizer"] == "AdamWOnRows"
    optimizer = measured["optimizer_seconds"]
    assert len(optimizer) == 4 and min(optimizer) >= 0 and max(optimizer) < PATIENCE_SECONDS
