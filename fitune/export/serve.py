"""`generate --serve`: the command with which vLLM or llama.cpp serves a model; no server of our own."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from fitune.config.adapter_folder import is_adapter, named_base
from fitune.config.gguf_files import gguf_files
from fitune.config.json_file import read_json
from fitune.config.model_shapes import cached_config
from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.export.adapter import AdapterFile
from fitune.export.adapter_servers import (
    SGLANG,
    VLLM,
    ServedBase,
    is_beside_other_weights,
    vllm_command,
    what_lacks,
)

INSTALL = {"vllm": "pip install vllm", "llama-server": "it comes with llama.cpp"}
MERGE_INTO = "merge it with --base MODEL, and serve the merged model's folder"
"Where an adapter names no base."


def server_command(given: Path, run: Run | None, port: int) -> list[str]:
    """Of a run or its checkpoint, an adapter's or a model's folder, a GGUF or its folder. UsageError for others."""
    if run is not None:
        given = run.result_folder
    if files := gguf_files(given):
        return ["llama-server", "--model", str(files[0]), "--jinja", "--port", str(port)]
    if is_adapter(given):
        return _with_adapter(given, port)
    if not (given / "config.json").is_file():
        raise UsageError(f"{given}: neither a run, an adapter, a model's folder nor a GGUF file")
    return ["vllm", "serve", str(given), "--port", str(port)]


def notes_on(given: Path, run: Run | None) -> list[str]:
    """What a server does otherwise than `eval`, which measured the result, and that SGLang does not take an adapter."""
    folder, notes = run.result_folder if run else given, []
    if not is_adapter(folder):
        return notes
    if is_beside_other_weights(folder, _base_config(folder)):
        notes.append(
            f"note: {folder} was trained, and measured, beside weights in NF4, and is served on the base's own: merge "
            f"it, and serve that folder, for what was trained"
        )
    with AdapterFile(folder) as file:
        if takes := what_lacks(SGLANG, file):
            notes.append(f"note: SGLang takes {takes}: for SGLang merge it, and serve the merged model's folder")
    return notes


def _base_config(adapter: Path) -> dict:
    """Of its base, where that is a folder or in the Hub's cache."""
    base, revision = named_base(adapter, MERGE_INTO)
    file = Path(base) / "config.json" if Path(base).is_dir() else cached_config(base, revision)
    return read_json(file, "give a model's folder") if file else {}


def serve(command: list[str]) -> None:
    """Prints the command, and becomes it where the program is installed."""
    program = shutil.which(command[0])
    print(shlex.join(command), flush=True)
    if program is None:
        print(f"{command[0]} is not installed ({INSTALL[command[0]]}); then type the line above", file=sys.stderr)
        return
    os.execv(program, command)


def _with_adapter(folder: Path, port: int) -> list[str]:
    """vLLM adds plain LoRA while it serves; all else must be merged."""
    with AdapterFile(folder) as file:
        if takes := what_lacks(VLLM, file):
            raise UsageError(f"{folder}: vLLM takes {takes}: merge it, and serve the merged model's folder")
        config = file.config
    base = ServedBase(*named_base(folder, MERGE_INTO))
    template = folder / "chat_template.jinja"
    return [
        *vllm_command(folder, config, base),
        *(["--chat-template", str(template)] if template.exists() else []),
        *("--port", str(port)),
    ]
