"""`generate --serve`: the command with which vLLM or llama.cpp serves a model; no server of our own."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from fitune.config.adapter_folder import is_adapter
from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.export.adapter import AdapterFile

INSTALL = {"vllm": "pip install vllm", "llama-server": "it comes with llama.cpp"}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"Of adapters, that vLLM takes as --max-lora-rank."
NAME = "tuned"
"Of an adapter, in requests; the base has its own."


def server_command(given: Path, run: Run | None, port: int) -> list[str]:
    """Of a run or its checkpoint, an adapter's or a model's folder, a GGUF or its folder. UsageError for others."""
    if run is not None:
        given = run.result_folder
    files = [given] if given.suffix == ".gguf" else sorted(given.glob("*.gguf"), key=lambda file: file.stat().st_size)
    if files:
        return ["llama-server", "--model", str(files[0]), "--jinja", "--port", str(port)]
    if is_adapter(given):
        return _with_adapter(given, port)
    if not (given / "config.json").is_file():
        raise UsageError(f"{given}: neither a run, an adapter, a model's folder nor a GGUF file")
    return ["vllm", "serve", str(given), "--port", str(port)]


def serve(command: list[str]) -> None:
    """Prints the command, and becomes it where the program is installed."""
    program = shutil.which(command[0])
    print(shlex.join(command), flush=True)
    if program is None:
        print(f"{command[0]} is not installed ({INSTALL[command[0]]}); then type the line above", file=sys.stderr)
        return
    os.execv(program, command)


def _with_adapter(folder: Path, port: int) -> list[str]:
    """vLLM adds plain LoRA on linear layers while it serves; all else must be merged."""
    with AdapterFile(folder) as file:
        config = file.config
    # it scales all modules by one alpha / r, and would not say that it leaves the patterns out
    parts = ("trainable_token_indices", "modules_to_save", "use_dora", "rank_pattern", "alpha_pattern")
    if part := next((part for part in parts if config.get(part)), None):
        raise UsageError(f"{folder}: vLLM takes no adapter with {part}: merge it, and serve the merged model's folder")
    rank = config.get("r") or 0
    largest = next((size for size in RANKS if size >= rank), None)
    if largest is None:
        raise UsageError(f"{folder}: vLLM takes adapters up to rank {RANKS[-1]}, this has {rank}: merge it")
    revision = ["--revision", config["revision"]] if config.get("revision") else []
    lora = ["--enable-lora", "--lora-modules", f"{NAME}={folder}", "--max-lora-rank", str(largest)]
    template = folder / "chat_template.jinja"
    return [
        *("vllm", "serve", str(config.get("base_model_name_or_path")), *revision, *lora),
        *(["--chat-template", str(template)] if template.exists() else []),
        *("--port", str(port)),
    ]
