"""Interpreters that read models, asked what they make of one."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fitune.config.schema import Run

HERE = Path(__file__).parent
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
NEW_TOKENS = 12


def ask(python: Path | str, script: str, file: Path, **question) -> dict:
    """What a script beside this file answers, run by another interpreter."""
    command = [str(python), str(HERE / script), str(file)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@dataclass
class Trained:
    """A run and its merged model; `now` and `now_bf16` are what the transformers of this interpreter makes of it."""

    base_name: str
    run: Run
    merged: Path

    @cached_property
    def now(self) -> dict:
        return self.ask_transformers(sys.executable, self.merged)

    @cached_property
    def now_bf16(self) -> dict:
        return self.ask_transformers(sys.executable, self.merged, dtype="bfloat16")

    def ask_transformers(self, python: Path | str, folder: Path, dtype: str = "float32") -> dict:
        return ask(python, "ask_transformers.py", folder, messages=MESSAGES, new_tokens=NEW_TOKENS, dtype=dtype)
