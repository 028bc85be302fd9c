"""The command line: what can be typed, and where each command does its work; `fitune.cli_results` goes on with results.

Nothing heavy is imported before a command needs it: `--help`, `list` and `show` answer at once.
"""

import sys
from pathlib import Path

import click

from fitune.cli_completion import (
    complete_gpu,
    complete_recipe,
    complete_recipe_or_run,
    completion_script,
)
from fitune.cli_group import Cli
from fitune.cli_options import (
    ABOVE_0,
    FiniteRange,
    machine_options,
    one_dataset,
    output_option,
    price_option,
    profile_option,
    recipe_argument,
    set_option,
)
from fitune.cli_results import RESULT_COMMANDS
from fitune.config import run as runs
from fitune.config.command_name import command, remember
from fitune.environment import keep_torch_brief


@click.group(
    cls=Cli, epilog="doctor\nlist\nplan llama3_8b_qlora", context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(runs.__version__, prog_name="fitune")
def cli(debug):
    """Fine-tune Llama 3, 70B above all, on the GPUs you own."""


@cli.command(
    short_help="What is wrong with this machine, and what to type.",
    epilog="doctor\ndoctor --model meta-llama/Meta-Llama-3-70B",
)
@click.option("--model", metavar="MODEL", help="Check access to this model. [default: Llama 3 8B]")
def doctor(model):
    """Versions, GPUs, memory, disk, login, access to the base; says what to fix."""
    from fitune.launching.doctor import doctor as check

    sys.exit(0 if check(model) else 1)


@cli.command(
    "list", short_help="What there is: recipes, memory profiles, what goes together.", epilog="list\nlist my_recipes"
)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
def list_command(folder):
    """Recipes, memory profiles, accelerate configs, and which go together: what is shipped, or FOLDER's own."""
    from fitune.config.catalogue import print_catalogue

    print_catalogue(folder)


@cli.command(
    short_help="One resolved run, and the line that starts it.", epilog="show llama3_70b_qlora --profile fsdp_4x24gb"
)
@recipe_argument
@profile_option
@set_option
@output_option
def show(recipe, profile, sets, output):
    """The resolved run.yaml and the exact launch line; loads nothing."""
    from fitune.launching.fastest_here import fastest_here
    from fitune.launching.launch import dry_run_text
    from fitune.planning.fill import resolve

    run = resolve(recipe, profile, sets, output) if profile else fastest_here(recipe, sets, output)
    click.echo(dry_run_text(run))


@cli.command(
    short_help="Does it fit, where do the bytes go, how long will it take.",
    epilog="plan llama3_70b_qlora --profile fsdp_4x24gb\n"
    'plan llama3_70b_qlora --gpu "RTX 4090" --gpus 2 --host-memory 64\n'
    "plan llama3_70b_qlora --all",
)
@recipe_argument
@profile_option
@click.option("--gpus", metavar="N", type=int, help="GPUs of one machine, instead of this one. [default with --gpu: 1]")
@click.option(
    "--machines", metavar="N", type=click.IntRange(min=1), default=1, help="So many of these machines. [default: 1]"
)
@click.option("--gpu-memory", type=ABOVE_0, metavar="GIB", help="Memory of one GPU.")
@click.option("--host-memory", type=ABOVE_0, metavar="GIB", help="RAM of one machine. [default: not checked]")
@click.option(
    "--gpu",
    metavar="MODEL",
    shell_complete=complete_gpu,
    help="GPU model, such as 'RTX 4090': its speed and its memory.",
)
@click.option(
    "--gpu-tflops",
    type=ABOVE_0,
    metavar="N",
    help="Its dense bf16 TFLOP/s, for a model that the table does not have.",
)
@click.option("--find", is_flag=True, help="Also the table of what was tried, and of profiles of your own.")
@click.option("--all", "all_tiers", is_flag=True, help="Every profile against every method.")
@click.option(
    "--profiles",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Profiles of your own, beside the shipped ones and those in your recipe's folder.",
)
@click.option("--details", is_flag=True, help="Also memory by phase, host RAM, disk, the parts of a step's time.")
@price_option
@click.option("--network", type=ABOVE_0, metavar="GB/S", help="Between machines. [default: 12.5]")
@set_option
@click.option("--json", "in_json", is_flag=True, help="Exact numbers instead of tables.")
def plan(recipe, profile, sets, **options):
    """Does it fit, where do the bytes go, how long will it take; loads nothing.

    For a model's or an adapter's folder instead of a recipe: the ways in which `generate` and `eval` can hold it.
    """
    from fitune.planning.plan_command import plan_command

    plan_command(recipe, profile, sets, **options)


@cli.command(
    short_help="Check, split and tokenise the rows.",
    epilog="prepare llama3_8b_qlora\nprepare llama3_8b_qlora --dataset rows.jsonl",
)
@click.argument("recipe", required=False, shell_complete=complete_recipe)
@click.option(
    "--dataset",
    type=click.Path(),
    multiple=True,
    callback=one_dataset,
    help="A Hub id, a file or a folder, instead of a recipe's.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder to write. [default: the recipe's data.prepared]"
)
@set_option
@click.option(
    "--tokenizer", type=click.Path(), help="Folder or Hub id of the tokenizer. [default: the recipe's base.model]"
)
@click.option("--no-tokens", is_flag=True, help="Don't tokenise (no access to the base model needed); train does then.")
@click.option("--template", "template_choice", metavar="NAME", help="Chat template, instead of the recipe's.")
@click.option(
    "--max-length", metavar="N", type=click.IntRange(min=1), help="Tokens a row may have, instead of the recipe's."
)
@click.option(
    "--long-rows", metavar="WAY", type=click.Choice(["refuse", "drop", "cut"]), help="refuse, drop or cut longer rows."
)
@click.option(
    "--format",
    metavar="FORMAT",
    type=click.Choice(["messages", "sharegpt", "alpaca", "prompt_completion", "text"]),
    help="messages, sharegpt, alpaca, prompt_completion or text. [default: found out]",
)
@click.option("--drop-invalid", is_flag=True, help="Go on without the rows that cannot be used.")
@click.option("--escape-control-tokens", is_flag=True, help="Break up control tokens in texts, don't refuse them.")
@click.option("--parquet", is_flag=True, help="Also write train.parquet and test.parquet.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder.")
@click.option("--workers", metavar="N", type=click.IntRange(min=1), help="Processes. [default: all cores]")
@click.option(
    "--preview",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    help="Show the first N rows as the model sees them.",
)
def prepare(recipe, dataset, output, sets, **options):
    """Check rows, split them, tokenise them: train.jsonl, test.jsonl, their tokens, report.json.

    With --dataset your own rows take the place of the recipe's; template, length, tokenizer and system message are the
    recipe's, and `train RECIPE` uses what was written.
    """
    from rich.console import Console

    from fitune.data.prepare_command import prepare_command
    from fitune.demo.tiny_base import make_demo_base

    if recipe and not (options["no_tokens"] or options["tokenizer"]):
        make_demo_base(recipe, sets)
    prepare_command(recipe, dataset, output, sets, console=Console(highlight=False), **options)


@cli.command(
    short_help="Train a recipe, or go on with a run.",
    epilog="train llama3_8b_qlora\n"
    "train llama3_8b_qlora --set training.max_steps=50\n"
    "train --resume runs/llama3_8b_qlora-single_gpu",
)
@click.argument("recipe", metavar="RECIPE|RUN_FOLDER", shell_complete=complete_recipe_or_run)
@profile_option
@set_option
@output_option
@click.option("--resume", is_flag=True, help="Continue the run in RUN_FOLDER, or in --output, from its checkpoints.")
@click.option(
    "--max-restarts",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    help="Resume by itself after a crash, at most N times.",
)
@click.option("--dry-run", is_flag=True, help="Print run.yaml and the launch line, start nothing.")
@click.option("--force", is_flag=True, help="Train even if the plan says that it does not fit.")
@click.option("--machines", metavar="N", type=click.IntRange(min=1), help="Machines like this one, without --profile.")
@click.option("--quiet", is_flag=True, help="Print the result, warnings and errors only.")
@machine_options
def train(recipe, profile, sets, output, **options):
    """Write run.yaml and accelerate.yaml, then start the processes with accelerate launch.

    Without --profile, `plan` finds what is fastest on this machine: GPUs, what lies in RAM, rows a pass, kept layers.

    `train --resume RUN_FOLDER` continues a run as it was, from its newest whole checkpoint; --set and --profile change
    it. SIGTERM or Ctrl-C: the step is finished and saved, exit code 75. A second one ends the run at once.
    """
    from fitune.training.train_command import train_command

    sys.exit(train_command(recipe, profile, sets, output, **options))


@cli.command(
    short_help="Train as a job of Slurm, SkyPilot or Kubernetes.",
    epilog="submit llama3_70b_qlora --on slurm --gpus 8 --dry-run",
)
@recipe_argument
@click.option(
    "--on",
    "scheduler",
    required=True,
    metavar="SCHEDULER",
    type=click.Choice(["slurm", "skypilot", "kubernetes"]),
    help="slurm, skypilot or kubernetes.",
)
@profile_option
@set_option
@output_option
@click.option("--nodes", metavar="N", type=click.IntRange(min=1), help="Machines. [default: the profile's, else 1]")
@click.option("--gpus", metavar="N", type=click.IntRange(min=1), help="GPUs of each node. [default: the profile's]")
@click.option(
    "--gpu",
    metavar="MODEL",
    shell_complete=complete_gpu,
    help="GPU model to ask SkyPilot for, such as H100.",
)
@click.option(
    "--image", metavar="NAME", help="Container image with fitune, for Kubernetes and SkyPilot (see Dockerfile)."
)
@click.option(
    "--setup",
    metavar="COMMAND",
    default="",
    help="Command that puts fitune in PATH, such as 'source .venv/bin/activate'.",
)
@click.option(
    "--hours",
    metavar="N",
    type=FiniteRange(min=0.1),
    help="After so many the job is ended; it goes on in the next. For Slurm and Kubernetes. [default: 24]",
)
@click.option("--cpus", metavar="N", type=click.IntRange(min=1), help="Cores of each node. [default: two for each GPU]")
@click.option(
    "--memory",
    metavar="GIB",
    type=click.IntRange(min=1),
    help="RAM of each node. [default: what `plan` says with --profile, else the scheduler's]",
)
@click.option("--bucket", metavar="URL", help="Storage that SkyPilot mounts for checkpoints, such as s3://mine.")
@click.option("--partition", metavar="NAME", help="Slurm's partition.")
@click.option("--dry-run", is_flag=True, help="Write the job file and print it, hand nothing over.")
def submit(recipe, scheduler, dry_run, profile, sets, output, **options):
    """Write a job file for Slurm, SkyPilot or Kubernetes and hand it to sbatch, sky or kubectl.

    The job prepares the rows, trains, and after a preemption goes on from its last checkpoint.
    """
    from fitune.launching.submit import submit as write_and_hand_over

    file, answer = write_and_hand_over(recipe, profile, sets, output, scheduler=scheduler, dry_run=dry_run, **options)
    click.echo(file.read_text(encoding="utf-8") if dry_run else answer, nl=not dry_run)
    click.echo(f"job file: {file}", err=True)


for _result_command in RESULT_COMMANDS:
    cli.add_command(_result_command)


@cli.command(short_help="The completion script for bash, zsh or fish.", epilog="completion bash >> ~/.bashrc")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell):
    """The completion script for a shell."""
    program, variable = _completed_program()
    click.echo(f"# completes {'./' if program.endswith('.py') else ''}{program}")
    click.echo(completion_script(shell, cli, program, variable))


def _completed_program() -> tuple[str, str]:
    """The program that a shell completes, and the environment variable by which it asks."""
    return ("cli.py", "_CLI_PY_COMPLETE") if command().endswith(".py") else ("fitune", "_FITUNE_COMPLETE")


def main() -> None:
    """What `fitune`, `python cli.py` and `python -m fitune` run."""
    name = remember(sys.argv[0])
    keep_torch_brief()
    cli(prog_name=name, complete_var=_completed_program()[1])
