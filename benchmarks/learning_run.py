"""What proofs that something learns share: rows prepared once, runs through fitune's commands, their curves."""

import json
import subprocess
import sys
from pathlib import Path

from tier_run import ROOT


def fitune(*arguments) -> None:
    """One command; what it prints goes to stderr, beside the tables."""
    subprocess.run([sys.executable, "cli.py", *map(str, arguments)], cwd=ROOT, check=True, stdout=sys.stderr)


def prepare_rows(options) -> Path:
    """The folder of `options.dataset`, prepared for `options.model`, some of its rows held out."""
    options.output.mkdir(parents=True, exist_ok=True)
    data = options.output / "data"
    fitune(
        "prepare", "--dataset", options.dataset, "--output", data, "--tokenizer", options.model, "--template",
        options.template, "--max-length", options.max_length, "--long-rows", "drop", "--drop-invalid", "--overwrite",
        "--set", "data.test_fraction=0.15",
    )  # fmt: skip
    return data


def folder_of(name: str, output: Path) -> Path:
    """Of a run that tables call `name`."""
    return output.absolute() / name.replace(", ", "-").replace(" ", "-")


def shared_sets(options, data: Path, seed: int) -> dict[str, object]:
    """--set of all runs that are compared."""
    return {
        "base.model": options.model.absolute(), "data.prepared": data.absolute(), "max_length": options.max_length,
        "data.chat_template": options.template, "data.system_message": "null", "seed": seed, "global_batch_size": 8,
        "profile.micro_batch": 4, "profile.kept_layers": 0, "training.max_steps": options.steps,
        "training.logging_steps": 1, "training.learning_rate": options.learning_rate,
        "training.save_strategy": "'no'", "training.eval_strategy": "'no'", "training.report_to": "none",
        "training.disable_tqdm": "true",
    }  # fmt: skip


def curve_and_held_out(folder: Path) -> dict:
    """The training curve of a finished run, and what `eval` measured of it."""
    fitune("eval", folder)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "curve": [{key: step[key] for key in ("step", "loss", "grad_norm")} for step in steps if "loss" in step],
        "held_out": json.loads((folder / "eval.json").read_text(encoding="utf-8")),
    }
