"""`generate --serve`: the command with which vLLM or llama.cpp serves a model; no server of our own."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from fitune.config.adapter_folder import is_adapter, named_base, was_trained_in_nf4
from fitune.config.gguf_files import gguf_files
from fitune.config.schema import Run
from fitune.errors import UsageError
from fitune.export.adapter import AdapterFile, read_adapter

INSTALL = {"vllm": "pip install vllm", "llama-server": "it comes with llama.cpp"}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"Of adapters, that vLLM takes as --max-lora-rank."
NOT_IN_VLLM = ("trainable_token_indices", "modules_to_save", "use_dora", "rank_pattern", "alpha_pattern")
"Keys of adapter_config.json. vLLM 0.33 reads patterns; others scale all modules by one alpha / r, without a word."
NAME = "tuned"
"Of an adapter, in requests; the base has its own."


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


def note_on(given: Path, run: Run | None) -> str:
    """What a server does otherwise than `eval`, which measured the result; '' where it does the same."""
    folder = run.result_folder if run else given
    if not (is_adapter(folder) and was_trained_in_nf4(folder)):
        return ""
    return (
        f"note: {folder} was trained, and measured, beside weights in NF4, and is served on the base's own: merge it, "
        f"and serve that folder, for what was trained"
    )


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
        config = file.config
        _refuse_what_vllm_lacks(file)
    rank = config.get("r") or 0
    largest = next((size for size in RANKS if size >= rank), None)
    if largest is None:
        raise UsageError(f"{folder}: vLLM takes adapters up to rank {RANKS[-1]}, this has {rank}: merge it")
    base, at = named_base(folder, "merge it with --base MODEL, and serve the merged model's folder")
    revision = ["--revision", at] if at else []
    lora = ["--enable-lora", "--lora-modules", f"{NAME}={folder}", "--max-lora-rank", str(largest)]
    template = folder / "chat_template.jinja"
    return [
        *("vllm", "serve", base, *revision, *lora),
        *(["--chat-template", str(template)] if template.exists() else []),
        *("--port", str(port)),
    ]


def _refuse_what_vllm_lacks(file: AdapterFile) -> None:
    """UsageError for what vLLM refuses, and for what it, or an older one, leaves out without a word."""
    bias = file.config.get("bias") or "none"  # vLLM refuses any other, whether biases were trained or not
    asked = [f"bias {bias}"] * (bias != "none") + [key for key in NOT_IN_VLLM if file.config.get(key)]
    part = next(iter(asked), None)
    lora = None if part else read_adapter(file)  # refuses starts that change the base
    if lora and (lora.tokens or lora.replaced):
        part = "whole modules or trained tokens"
    if part:
        raise UsageError(
            f"{file.folder}: vLLM takes no adapter with {part}: merge it, and serve the merged model's folder"
        )
