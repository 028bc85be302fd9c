"""origin.json: what a run was started with, so that its page can name it: command, versions, hardware, hashes."""

import importlib.metadata
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

from fitune.config.command_name import command
from fitune.config.trained_rows import keep_trained_rows
from fitune.environment import TYPED
from fitune.planning.hardware import this_machine

ORIGIN = "origin.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "liger-kernel")


def remember_what_was_typed(arguments: list[str] | None = None) -> None:
    """Notes the command line, `sys.argv` where none is given, for `write_origin` in the ranks."""
    os.environ[TYPED] = command(*(sys.argv[1:] if arguments is None else arguments))


def write_origin(folder: Path, identity: dict, *, resumed: bool) -> None:
    """Called by the main process after its first step. A run that goes on keeps its first start and adds this one.

    Keeps beside it which rows are trained: see `fitune.config.trained_rows`.
    """
    keep_trained_rows(folder, identity["data"])
    file, starts = folder / ORIGIN, []
    if resumed and file.is_file():
        try:
            starts = json.loads(file.read_text(encoding="utf-8"))["starts"]
        except (ValueError, KeyError, TypeError):
            starts = []  # damaged: begun anew
    now = datetime.now(UTC).isoformat(timespec="seconds")
    starts.append({"at": now, "typed": os.environ.get(TYPED)})
    content = {"starts": starts, "versions": _versions(), "hardware": _hardware(), "identity": identity}
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)


def _versions() -> dict[str, str]:
    """Of Python and of what is installed of PACKAGES."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hardware() -> dict:
    """Of the machine of rank 0. Memory in GiB."""
    machine = this_machine()
    return {
        "gpu": machine.gpus[0].name if machine.gpus else None,
        "gpus": len(machine.gpus),
        "gpu_memory_gib": round(machine.gpus[0].total_gib, 1) if machine.gpus else None,
        "host_memory_gib": round(machine.host_total_gib, 1),
        "cores": len(os.sched_getaffinity(0)),
    }
