"""The whole job on an embedded default, from nothing to a merged model that answers: `make demo`.

    python -m fitune.demo [--output runs/demo]

Every stage is the command a user would type, printed before it runs. The base is a tiny Llama with random weights, the
data are human-written tasks with short answers; training goes through accelerate launch with two CPU processes, FSDP2
over gloo, an NF4 base and LoRA on all linears: the code path that trains 70B.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fitune.columns import printable
from fitune.config.command_name import command
from fitune.config.run import load_recipe
from fitune.environment import COMMAND
from fitune.errors import STOPPED_BY_CTRL_C, FituneError

RECIPE, PROFILE = "tiny_qlora", "cpu_2proc"
MEMORISED = 16
"""How many training prompts are asked again, greedily, at the end: the first ones of train.jsonl."""


def demo(folder: Path, console: Console) -> None:
    """Runs every stage into `folder` and prints a summary. FituneError if a stage fails or nothing was learned."""
    started = time.perf_counter()
    recipe = load_recipe(RECIPE)
    base, data = Path(recipe.base.model), Path(recipe.data.prepared)
    run, merged = folder / "run", folder / "merged"
    _remake(console, base, ["-m", "fitune.demo.tiny_base", str(base)])
    _remake(console, data, ["-m", "fitune", "prepare", RECIPE])
    _stage(console, ["-m", "fitune", "train", RECIPE, "--profile", PROFILE, "--output", str(run)])
    _stage(console, ["-m", "fitune", "eval", str(run)])
    _stage(console, ["-m", "fitune", "merge", str(run), "--output", str(merged)])
    prompts = [row["messages"][0]["content"] for row in _rows(data / "train.jsonl")[:3]]
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    _stage(console, ["-m", "fitune", "generate", str(run), *asked, "--max-new-tokens", "40"])
    report = memorised(base, merged, _rows(data / "train.jsonl")[:MEMORISED])
    (folder / "memorised.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _summary(console, folder, report, time.perf_counter() - started)
    _refuse_a_demo_that_learned_nothing(report, json.loads((run / "eval.json").read_text()))


def _remake(console: Console, target: Path, arguments: list[str]) -> None:
    if target.exists():
        console.print(f"[dim]{target} is there already[/dim]")
    else:
        _stage(console, arguments)


def _stage(console: Console, arguments: list[str]) -> None:
    """One stage, as arguments of Python; shown as it would be typed."""
    console.rule(style="dim")
    is_command = arguments[:2] == ["-m", "fitune"]
    typed = command(*arguments[2:]) if is_command else f"python {shlex.join(arguments)}"
    console.print(f"$ {typed}", style="bold", markup=False, soft_wrap=True)
    done = subprocess.run([sys.executable, *arguments], env=os.environ | {COMMAND: command()}, check=False)
    if done.returncode:
        raise FituneError(f"the stage above ended with exit code {done.returncode}")


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def memorised(base: Path, merged: Path, rows: list[dict]) -> dict:
    """The share of the answers' tokens that base and merged model give back greedily, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    report = {
        "prompts": [{"prompt": row["messages"][0]["content"], "answer": row["messages"][-1]["content"]} for row in rows]
    }
    for label, folder in (("base", base), ("merged", merged)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        right = total = 0
        for row, entry in zip(rows, report["prompts"], strict=True):
            prompt = tokenizer.apply_chat_template(
                row["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            whole = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
            length = prompt["input_ids"].shape[1]
            wanted = whole[length:]
            given = model.generate(**prompt, max_new_tokens=len(wanted), do_sample=False)[0, length:].tolist()
            right += sum(a == b for a, b in zip(given, wanted, strict=False))
            total += len(wanted)
            entry[label] = tokenizer.decode(given, skip_special_tokens=True).strip()
        report[f"{label}_token_share"] = right / total
    return report


def _summary(console: Console, folder: Path, report: dict, seconds: float) -> None:
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    held_out = json.loads((folder / "run" / "eval.json").read_text())
    console.rule("[bold]summary")
    table = Table("", "before", "after", box=None)
    table.add_row("training loss", f"{losses[0]:.2f}", f"{losses[-1]:.2f}")
    table.add_row("held-out loss", f"{held_out['base']['loss']:.2f}", f"{held_out['tuned']['loss']:.2f}")
    shares = f"{report['base_token_share']:.0%}", f"{report['merged_token_share']:.0%}"
    table.add_row(f"answer tokens given back, {MEMORISED} training prompts", *shares)
    console.print(table)
    answers = Table("prompt", "base answers", "tuned model answers", show_lines=True)
    for entry in report["prompts"][:3]:
        answers.add_row(*(printable(entry[key]) for key in ("prompt", "base", "merged")))
    console.print(answers, markup=False)
    console.print(
        f"adapter:      {folder}/run/adapter\nloss curve:   {folder}/run/loss.png\n"
        f"page:         {folder}/run/report.html\n"
        f"merged model: {folder}/merged\nanswers:      {folder}/memorised.json, to all {MEMORISED} prompts\n"
        f"in {seconds:.0f} s",
        soft_wrap=True,
    )
    console.print(
        "\non a real GPU (24 GB, after `hf auth login`):\n"
        f"  {command()} prepare llama3_8b_qlora && {command()} train llama3_8b_qlora --profile single_gpu",
        soft_wrap=True,
    )


def _refuse_a_demo_that_learned_nothing(report: dict, held_out: dict) -> None:
    if report["merged_token_share"] < 0.9 or report["base_token_share"] >= 0.1:
        raise FituneError("the merged model should give back 90 % of the answers' tokens and the base under 10 %")
    if held_out["tuned"]["loss"] >= held_out["base"]["loss"]:
        raise FituneError("the held-out loss should have fallen")


def main() -> None:
    parser = argparse.ArgumentParser(prog="fitune.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write (made anew)")
    folder = parser.parse_args().output
    console = Console(highlight=False)
    try:
        if folder.exists():
            raise FituneError(f"{folder} exists; remove it, or choose another with --output")
        folder.mkdir(parents=True)
        demo(folder, console)
    except FituneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # the stage that was running has heard it too
        print("stopped", file=sys.stderr)
        sys.exit(STOPPED_BY_CTRL_C)


if __name__ == "__main__":
    main()
