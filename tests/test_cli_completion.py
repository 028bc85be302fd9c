"""What shells get when they ask the command line to complete, and bash itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_SECONDS

from fitune.config import run as runs
from fitune.config.set_keys import set_keys

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, str(ROOT / "cli.py"))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a run, a model and a GGUF file."""
    for file in ("runs/first/run.yaml", "models/mine/config.json", "models/mine.gguf", "notes/a.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(shell: str, *words: str) -> list[str]:
    """What the program answers to a shell that completes the last word."""
    separator = "\n" if shell == "fish" else " "
    environment = {"_CLI_PY_COMPLETE": f"{shell}_complete", "COMP_WORDS": separator.join(["cli.py", *words])}
    environment["COMP_CWORD"] = words[-1] if shell == "fish" else str(len(words))
    done = subprocess.run(
        COMMAND, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=os.environ | environment
    )
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    if shell == "zsh":  # type, value, help
        return lines[1::3]
    return [line.split(",", 1)[1] for line in lines]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_keys_of_set(shell, folder):
    assert asked(shell, "train", "llama3_8b_qlora", "--set", "training.learning_r") == ["training.learning_rate="]
    assert asked(shell, "train", "llama3_8b_qlora", "--set", "profile.micro") == ["profile.micro_batch="]


@pytest.mark.parametrize(
    "words, expected",
    [
        (("eval", "ru"), {"runs/", "runs/first"}),
        (("generate", "models/m"), {"models/mine", "models/mine.gguf"}),
        (("merge", ""), {"runs/", "models/", "notes/"}),
        (("report", "runs/first", "--compare", "runs/"), {"runs/first"}),
        (("train", "runs/f"), {"runs/first"}),
        (("plan", "llama3_8b_qlora", "--gpu", "RTX-40"), {"RTX-4060", "RTX-4090"}),
        (("plan", "llama3_8b_qlora", "--gpu", "rtx-4090"), {"RTX-4090"}),
        (("push", "runs/first", "--onto", "o"), {"original"}),
    ],
)
def test_runs_models_and_gpus(words, expected, folder):
    found = set(asked("bash", *words))
    assert expected <= found and not {"notes/a.txt"} & found, found


def test_profiles_are_those_of_the_recipe(folder):
    own = asked("bash", "train", "llama3_70b_full", "--profile", "")
    assert "fsdp_full_16x80gb" in own and "single_gpu" not in own
    assert "single_gpu" in asked("bash", "plan", "no_such_recipe", "--profile", "")


@pytest.mark.parametrize(
    "words", [("prepare", "--dataset", "r"), ("quantize", "m"), ("eval", "runs/first", "--data", "d")]
)
def test_the_shell_completes_files_itself(words, folder):
    done = subprocess.run(
        COMMAND, capture_output=True, text=True, timeout=PATIENCE_SECONDS,
        env=os.environ | {"_CLI_PY_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(["cli.py", *words]),
                          "COMP_CWORD": str(len(words))},
    )  # fmt: skip
    assert done.stdout.startswith("file,"), done.stdout


def test_every_key_that_is_completed_can_be_set():
    keys = set_keys()
    assert len(keys) == len(set(keys)) > 80
    for key in ("lora.r", "base.model", "data.prepared", "early_stopping.patience", "data.mix", "seed",
                "training.max_steps", "profile.kept_layers"):  # fmt: skip
        assert key in keys
    assert "training.gradient_accumulation_steps" not in keys and "training" not in keys
    runs.resolve("llama3_8b_qlora", "single_gpu", ("lora.r=8", "training.max_steps=3", "profile.kept_layers=2"))


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("train llama3_8b_qlora --set lora.alp", ["compopt -o nospace", "lora.alpha="]),
        ("train my\\\\\\ rec", ["compopt -o nospace", "compopt -o filenames", "my recipes/"]),
    ],
)
def test_bash_completes_and_lets_one_type_on_behind_a_key_or_a_folder_with_spaces(typed, told, folder):
    """The script as `completion bash` prints it; outside of a completion `compopt` tells what it is asked."""
    (folder / "my recipes").mkdir()
    program = folder / "cli.py"
    program.write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    program.chmod(0o755)
    lines = f"""
        compopt() {{ printf 'compopt %s %s\\n' $1 $2; }}
        source <({program} completion bash)
        COMP_WORDS=(cli.py {typed}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _clipy_completion {program}
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.stdout.splitlines()[-len(told) :] == told, done.stdout + done.stderr
