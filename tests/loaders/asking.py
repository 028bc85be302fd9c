"""Interpreters that read models, asked what they make of one."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fitune.config.schema import Run
from fitune.export.gguf import export_gguf
from fitune.export.whole_model import whole_model

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

    def gguf(self, kind: str) -> Path:
        """The merged model as a file, made once, which `export` has checked by the real llama.cpp."""
        folder = self.merged.with_name(f"{self.merged.name}-{kind}")
        if not folder.exists():
            said = io.StringIO()
            with redirect_stderr(said):
                [file] = export_gguf(whole_model(self.merged, None), folder, kind)
            assert f"check: {file.name}: 4 prompts: log-probabilities" in said.getvalue()
        return next(folder.glob("*.gguf"))

    def ask_transformers(self, python: Path | str, folder: Path, dtype: str = "float32") -> dict:
        return ask(python, "ask_transformers.py", folder, messages=MESSAGES, new_tokens=NEW_TOKENS, dtype=dtype)
