"""The command line: pick a recipe and a memory profile, prepare, train, evaluate, generate, merge.

Nothing heavy is imported before a command needs it: `--help`, `list` and `show` answer at once.
"""

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

import click

from fitune import environment
from fitune.config import run as runs
from fitune.config.command_name import command, remember
from fitune.config.shipped import PROFILES, RECIPES
from fitune.errors import INTERRUPTED, STOPPED_BY_CTRL_C, FituneError, UsageError, is_out_of_memory


class Command(click.Command):
    """A command whose example is shown as the user would type it: `fitune` may have been called otherwise."""

    def format_epilog(self, ctx, formatter) -> None:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(self.epilog.replace("fitune ", f"{command()} "))


class Cli(Command, click.Group):
    """Prints an expected error as one line and exits with its code; --debug shows the traceback. So with Ctrl-C."""

    command_class = Command

    def format_epilog(self, ctx, formatter) -> None:
        with formatter.section("Environment variables"):
            formatter.write_dl(list(environment.MEANINGS.items()))
        super().format_epilog(ctx, formatter)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (FituneError, KeyboardInterrupt, RuntimeError, MemoryError) as error:
            line, code = _in_one_line(error, ctx.invoked_subcommand)
            if line is None or ctx.params.get("debug"):
                raise
            click.echo(line, err=True)
            ctx.exit(code)


def _in_one_line(error: BaseException, command_name: str | None) -> tuple[str | None, int]:
    """What to print for an error, None where nobody expected it, and the exit code."""
    if isinstance(error, FituneError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        if command_name == "train":
            return "stopped: before the first step, with nothing to save", INTERRUPTED
        return "stopped", STOPPED_BY_CTRL_C
    if is_out_of_memory(error):
        from fitune.training.out_of_memory import explain_in_one_process

        return f"error: {explain_in_one_process(error)}", FituneError.exit_code
    return None, 1


def recipes_and_profiles(kind: str):
    """Shell completion of a recipe or a profile, shipped or in a file."""

    def complete(ctx, param, incomplete):
        from fitune.config.catalogue import completed

        return completed(RECIPES if kind == "recipe" else PROFILES, kind)(ctx, param, incomplete)

    return complete


recipe_argument = click.argument("recipe", shell_complete=recipes_and_profiles("recipe"))
profile_option = click.option(
    "--profile",
    help="Memory profile (see `list`) or a .yaml file. [default: what is fastest on this machine]",
    shell_complete=recipes_and_profiles("profile"),
)
set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value: training.learning_rate=1e-4, lora.r=32, profile.micro_batch=2.",
)
force_option = click.option("--force", is_flag=True, help="Go on even if the base may not be the adapter's own.")
check_option = click.option(
    "--check/--no-check",
    default=True,
    help="Compare what was written with base plus adapter on a few held-out prompts. [default: check]",
)
base_option = click.option(
    "--base", metavar="MODEL", help="Merge into this model: the bf16 original of an NF4 base (with --force)."
)
onto_option = click.option(
    "--onto",
    type=click.Choice(["trained", "original"]),
    help="Add the adapter to the weights that training computed with, for qlora NF4, or to the base's own.",
)
output_option = click.option("--output", type=click.Path(), help="Run folder. [default: runs/RECIPE-PROFILE]")


@click.group(cls=Cli, epilog="Start with:  fitune list", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(runs.__version__, prog_name="fitune")
def cli(debug):
    """Fine-tune Llama 3, 70B above all, on the GPUs you own."""


@cli.command("list", epilog="Example:  fitune list   or   list my_recipes")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
def list_command(folder):
    """Recipes, memory profiles, accelerate configs, and which go together: what is shipped, or FOLDER's own."""
    from fitune.config.catalogue import print_catalogue

    print_catalogue(folder)


@cli.command(epilog="Example:  fitune show llama3_70b_qlora --profile fsdp_4x24gb")
@recipe_argument
@profile_option
@set_option
@output_option
def show(recipe, profile, sets, output):
    """The resolved run.yaml and the exact launch line; loads nothing."""
    from fitune.planning.fill import resolve

    run = resolve(recipe, profile, sets, output) if profile else _fastest_here(recipe, sets, output)
    click.echo(runs.dump(run), nl=False)
    click.echo("\n# " + _launch_line(run, "fitune.training.train"))


@cli.command(epilog="Example:  fitune plan llama3_70b_qlora --profile fsdp_4x24gb   or   ... --all")
@recipe_argument
@profile_option
@click.option("--gpus", type=int, help="Number of GPUs, instead of this machine. [default with --gpu: 1]")
@click.option("--gpu-memory", type=float, metavar="GIB", help="Memory of one GPU.")
@click.option("--host-memory", type=float, metavar="GIB", help="RAM. [default: not checked]")
@click.option("--gpu", metavar="MODEL", help="GPU model, such as 'RTX 4090': its speed, and its memory.")
@click.option(
    "--gpu-tflops",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Its dense bf16 TFLOP/s, for a model that the table does not have.",
)
@click.option("--find", is_flag=True, help="The fastest profile that fits the hardware, here or given with --gpus.")
@click.option("--all", "all_tiers", is_flag=True, help="Every profile against every method.")
@click.option("--price-per-hour", "price", type=click.FloatRange(min=0), help="Of all GPUs together.")
@click.option(
    "--network", type=click.FloatRange(min=0, min_open=True), metavar="GB/S", help="Between machines. [default: 12.5]"
)
@set_option
@click.option("--json", "in_json", is_flag=True, help="Exact numbers instead of tables.")
def plan(recipe, profile, sets, **options):
    """Does it fit, where do the bytes go, how long will it take; loads nothing."""
    from fitune.planning.command import plan_command

    plan_command(recipe, profile, sets, **options)


@cli.command(epilog="Example:  fitune prepare llama3_8b_qlora   or   prepare llama3_8b_qlora --dataset rows.jsonl")
@click.argument("recipe", required=False, shell_complete=recipes_and_profiles("recipe"))
@click.option("--dataset", help="A Hub id, a file or a folder, instead of a recipe's.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder to write. [default: the recipe's data.prepared]"
)
@set_option
@click.option("--tokenizer", help="Folder or Hub id of the tokenizer. [default: the recipe's base.model]")
@click.option("--no-tokens", is_flag=True, help="Don't tokenise (no access to the base model needed); train does then.")
@click.option("--template", "template_choice", help="Chat template, instead of the recipe's.")
@click.option("--max-length", type=click.IntRange(min=1), help="Tokens a row may have, instead of the recipe's.")
@click.option("--long-rows", type=click.Choice(["refuse", "drop", "cut"]), help="What to do with longer rows.")
@click.option(
    "--format",
    type=click.Choice(["messages", "sharegpt", "alpaca", "prompt_completion", "text"]),
    help="What the rows look like. [default: found out]",
)
@click.option("--drop-invalid", is_flag=True, help="Go on without the rows that cannot be used.")
@click.option("--escape-control-tokens", is_flag=True, help="Break up control tokens in texts, don't refuse them.")
@click.option("--parquet", is_flag=True, help="Also write train.parquet and test.parquet.")
@click.option("--overwrite", is_flag=True, help="Replace the output folder.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes. [default: all cores]")
@click.option("--preview", type=click.IntRange(min=0), default=0, help="Show the first N rows as the model sees them.")
def prepare(recipe, dataset, output, sets, **options):
    """Check rows, split them, tokenise them: train.jsonl, test.jsonl, their tokens, report.json.

    With --dataset your own rows take the place of the recipe's; template, length, tokenizer and system message are the
    recipe's, and `train RECIPE` uses what was written.
    """
    from rich.console import Console

    from fitune.data.prepare_command import prepare_command

    prepare_command(recipe, dataset, output, sets, console=Console(), **options)


def machine_options(command):
    """The flags by which each of several machines is told its place."""
    for option in (
        click.option("--machine-rank", type=click.IntRange(min=0), help="This machine's number, for several machines."),
        click.option("--main-process-ip", help="Address of machine 0."),
        click.option("--main-process-port", type=click.IntRange(1, 65535), help="A port on machine 0."),
    ):
        command = option(command)
    return command


@cli.command(epilog="Example:  fitune train llama3_8b_qlora --profile single_gpu --set training.max_steps=50")
@click.argument("recipe", metavar="RECIPE|RUN_FOLDER", shell_complete=recipes_and_profiles("recipe"))
@profile_option
@set_option
@output_option
@click.option("--resume", is_flag=True, help="Continue the run in RUN_FOLDER, or in --output, from its checkpoints.")
@click.option("--max-restarts", type=click.IntRange(min=0), default=0, help="Resume by itself after so many crashes.")
@click.option("--dry-run", is_flag=True, help="Print run.yaml and the launch line, start nothing.")
@click.option("--force", is_flag=True, help="Train even if the plan says that it does not fit.")
@click.option("--machines", type=click.IntRange(min=1), help="Number of machines like this one, without --profile.")
@machine_options
def train(recipe, profile, sets, output, resume, max_restarts, dry_run, force, machines, **place):
    """Write run.yaml and accelerate.yaml, then start the processes with accelerate launch.

    Without --profile, `plan` finds what is fastest on this machine: GPUs, what lies in RAM, rows a pass, kept layers.

    `train --resume RUN_FOLDER` continues a run as it was, from its newest whole checkpoint; --set and --profile change
    it. SIGTERM or Ctrl-C: the step is finished and saved, exit code 75. A second one ends the run at once.
    """
    from fitune.launching.run_folder import as_started, nothing_left
    from fitune.planning.fill import filled_here
    from fitune.report.origin import remember_what_was_typed

    again = (Path(recipe) / "run.yaml").is_file()
    if machines and (profile or again):
        raise UsageError("--machines is for a run without --profile: a profile's accelerate config has num_machines")
    if again:
        run = _run_to_continue(Path(recipe), profile, sets, output, resume)
    elif profile:
        run = runs.resolve(recipe, profile, sets, output)
    else:
        run = _fastest_here(recipe, sets, output, resume, machines or 1)
    if not dry_run:
        _check_place(run, place)
        if resume and (finished := nothing_left(run)):
            click.echo(finished)
            return
        if not again:
            runs.check_paths(recipe, sets, "data.prepared", "data.chat_template", "base.model")
    chosen = run.left_to_plan
    run = filled_here(as_started(run) if resume else run)
    if dry_run:
        click.echo(runs.dump(run), nl=False)
        click.echo("\n# " + _launch_line(run, "fitune.training.train"))
        return
    if chosen:
        click.echo("plan chose: " + ", ".join(f"{key} {getattr(run.profile, key)}" for key in chosen))
    remember_what_was_typed()
    code = _train(run, resume=resume, max_restarts=max_restarts, force=force, **place)
    if code:
        sys.exit(code)
    click.echo(f"result: {run.result_folder}   curve: {run.folder / 'loss.png'}   next: {command()} eval {run.folder}")
    _show(run, **place)


@cli.command(epilog="Example:  fitune submit llama3_70b_qlora --on slurm --nodes 2 --gpus 8 --dry-run")
@recipe_argument
@click.option("--on", "scheduler", required=True, type=click.Choice(["slurm", "skypilot", "kubernetes"]))
@profile_option
@set_option
@output_option
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines.")
@click.option("--gpus", type=click.IntRange(min=1), help="GPUs of each node. [default: the profile's]")
@click.option("--gpu", help="GPU model that SkyPilot is asked for, such as H100.")
@click.option("--image", help="Container image with fitune, for Kubernetes and SkyPilot (see Dockerfile).")
@click.option("--setup", default="", help="Command that puts fitune in PATH, such as 'source .venv/bin/activate'.")
@click.option("--hours", type=click.FloatRange(min=0.1), default=24, show_default=True, help="Longest time of a start.")
@click.option("--bucket", help="Storage that SkyPilot mounts for checkpoints, such as s3://mine.")
@click.option("--partition", help="Slurm's.")
@click.option("--dry-run", is_flag=True, help="Write the job file and print it, hand nothing over.")
def submit(recipe, scheduler, dry_run, profile, sets, output, **options):
    """Write a job file for Slurm, SkyPilot or Kubernetes and hand it to sbatch, sky or kubectl.

    The job prepares the rows, trains, and after a preemption goes on from its last checkpoint.
    """
    from fitune.launching.submit import submit as write_and_hand_over

    file, answer = write_and_hand_over(recipe, profile, sets, output, scheduler=scheduler, dry_run=dry_run, **options)
    click.echo(file.read_text(encoding="utf-8") if dry_run else answer, nl=not dry_run)
    click.echo(f"job file: {file}", err=True)


@cli.command("eval", epilog="Example:  fitune eval runs/tiny_qlora-cpu_2proc   or   eval models/mine --data data/mine")
@click.argument("given", metavar="RUN|FOLDER", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Rows to measure on: a folder that prepare wrote, or its .jsonl. [default: the run's held-out rows]",
)
@click.option("--tasks", metavar="NAME,…", help="lm-eval's tasks instead, on the merged model, such as hellaswag.")
@click.option("--include", type=click.Path(path_type=Path), help="A folder with task files of your own, for --tasks.")
@click.option("--limit", type=click.IntRange(min=1), help="Only so many rows of each task.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Also write the tasks' figures to this file."
)
@force_option
@machine_options
def eval_command(given, data, tasks, include, limit, json_file, force, **place):
    """Loss, perplexity and token accuracy on the test split, base against tuned.

    RUN may be one of its checkpoints, RUN/checkpoints/checkpoint-N. The folder of a merged model or of an adapter is
    measured by itself, on one device, a .gguf file by llama.cpp; these need --data.
    """
    if given.suffix == ".gguf" and given.is_file():
        _eval_gguf(given, data)
    run = _run_or_nothing(given)
    if tasks:
        from fitune.training.tasks import tasks_command

        tasks_command(given, run, tasks.split(","), include=include, limit=limit, file=json_file, force=force)
        return
    if run is None:
        if data is None:
            raise UsageError(f"{given}: no run, so it knows no held-out rows: give --data FOLDER, which prepare wrote")
        from fitune.training.evaluate_folder import print_evaluation

        print_evaluation(given, data, force=force)
        return
    _check_place(run, place)
    _check_data(run, asked_as_trained=True, reads_rows=data is None)
    words = [*_checkpoint_flag(run), *(["--force"] if force else []), *(["--data", str(data)] if data else [])]
    _launch(run, "fitune.training.evaluate", *words, place=place)
    _show(run, **place)


@cli.command(epilog='Example:  fitune generate runs/tiny_qlora-cpu_2proc --prompt "Name three colours."')
@click.argument("run_or_model", type=click.Path(path_type=Path))
@click.option("--prompt", multiple=True, help="Ask this; may be repeated.")
@click.option("--test", type=click.IntRange(min=1), help="Ask the first N held-out prompts.")
@click.option("--chat", is_flag=True, help="A conversation with the tuned model.")
@click.option(
    "--serve", type=click.IntRange(1, 65535), metavar="PORT", help="Serve it with vLLM, a GGUF with llama.cpp."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 decodes greedily.")
@click.option("--seed", type=click.IntRange(min=0), help="Draw the same answers again. [default: other ones each time]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the answers to this file.")
@force_option
@machine_options
def generate(run_or_model, prompt, test, chat, serve, max_new_tokens, temperature, seed, json_file, force, **place):
    """Answers from base and tuned model side by side, or from a merged model.

    RUN_OR_MODEL may also be a checkpoint, RUN/checkpoints/checkpoint-N.
    """
    is_model = not (run_or_model / "run.yaml").is_file() and (run_or_model / "config.json").is_file()
    if serve:
        if prompt or test or chat:
            raise UsageError(
                "--serve starts a server, which is asked over its port: leave out --prompt, --test and --chat"
            )
        from fitune.export.serve import serve as start
        from fitune.export.serve import server_command

        is_file = run_or_model.suffix == ".gguf"
        start(server_command(run_or_model, None if is_file else _run_or_nothing(run_or_model), serve))
        return
    if not (prompt or test or chat):
        raise UsageError('nothing to ask: give --prompt "...", --test N or --chat')
    if is_model and test:
        raise UsageError(f"{run_or_model} is a model folder: --test needs a run folder, which knows the test split")
    arguments = [
        *(part for text in prompt for part in ("--prompt", text)),
        "--max-new-tokens",
        str(max_new_tokens),
        "--temperature",
        str(temperature),
        *(["--chat"] if chat else []),
        *(["--seed", str(seed)] if seed is not None else []),
        *(["--force"] if force else []),
        *(["--test", str(test)] if test else []),
        *(["--json", str(json_file)] if json_file else []),
    ]
    if is_model:
        from fitune.training.generate import generate_from_model, parse_options

        generate_from_model(run_or_model, parse_options([str(run_or_model), *arguments]))
    else:
        run = _run_or_checkpoint(run_or_model)
        _check_place(run, place)
        _check_data(run, asked_as_trained=True, reads_rows=bool(test))
        options = {"place": place} | ({"interrupts_go_on": True} if chat else {})
        _launch(run, "fitune.training.generate", *_checkpoint_flag(run), *arguments, **options)
        if test:
            _show(run, **place)


@cli.command(epilog="Example:  fitune quantize meta-llama/Meta-Llama-3-70B --output models/llama3-70b-nf4")
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
def quantize(model, revision, output):
    """A bf16 model in bitsandbytes' NF4 format, written once; then train with --set base.model=OUTPUT."""
    from fitune.config.hub import local_folder
    from fitune.output_folder import refuse_existing

    refuse_existing(output)
    folder = local_folder(model, revision)
    import torch

    from fitune.weights.quantize import quantize as write_nf4

    write_nf4(folder, output, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    click.echo(f"{output}: train on it with --set base.model={output}")


@cli.command(epilog="Example:  fitune doctor --model meta-llama/Meta-Llama-3-70B")
@click.option("--model", help="Check access to this model. [default: Llama 3 8B]")
def doctor(model):
    """Versions, GPUs, memory, disk, login, access to the base; says what to fix."""
    from fitune.launching.doctor import doctor as check

    sys.exit(0 if check(model) else 1)


@cli.command(epilog="Example:  fitune merge runs/tiny_qlora-cpu_2proc --output merged")
@click.argument("run_or_adapter", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New folder for the model.")
@base_option
@onto_option
@force_option
@check_option
def merge(run_or_adapter, output, base, onto, force, check):
    """A standard Hugging Face model from a run, or from RUN/checkpoints/checkpoint-N.

    RUN may also be the folder of any PEFT LoRA adapter; --base says what it was trained on.
    """
    options = {"base": base, "onto": onto, "force": force, "check": check}
    if (run_or_adapter / "adapter_config.json").is_file():
        from fitune.export.merge import merge_folder

        merge_folder(run_or_adapter, output, **options)
    else:
        run = _run_or_checkpoint(run_or_adapter)
        from fitune.export.merge import merge_run

        merge_run(run, output, **options)
    click.echo(f'merged: {output}   next: {command()} generate {output} --prompt "..."')


@cli.command(epilog="Example:  fitune export runs/llama3_8b_qlora-single_gpu --gguf bf16 --quantize q4_k_m")
@click.argument("given", metavar="RUN|MODEL", type=click.Path(path_type=Path))
@click.option("--gguf", "kind", required=True, metavar="TYPE", help="f16, bf16 or q8_0.")
@click.option("--quantize", "smaller", metavar="TYPE", help="Then make this of it with llama-quantize, such as q4_k_m.")
@click.option("--output", type=click.Path(path_type=Path), help="New folder. [default: RUN-gguf-TYPE]")
@base_option
@onto_option
@force_option
@check_option
def export(given, kind, smaller, output, **merging):
    """A GGUF file for llama.cpp, LM Studio and Ollama, whose Modelfile is written beside it.

    RUN is merged first; it may be a checkpoint of a run, a LoRA adapter's folder, or a merged model.
    """
    from fitune.export.gguf import export_gguf, refuse_impossible
    from fitune.export.whole_model import whole_model

    output = output or given.absolute().with_name(f"{given.absolute().name}-gguf-{kind}")
    refuse_impossible(kind, smaller, output)
    model = whole_model(given, _run_or_nothing(given), **merging)
    files = export_gguf(model, output, kind, smaller)
    click.echo(f"exported: {', '.join(map(str, files))}   next: ollama create NAME -f {output / 'Modelfile'}")


@cli.command(epilog="Example:  fitune push runs/llama3_8b_qlora-single_gpu --merged --repo my-llama")
@click.argument("given", metavar="RUN|FOLDER", type=click.Path(path_type=Path))
@click.option("--adapter", "what", flag_value="adapter", help="What training left. [default]", default=True)
@click.option("--merged", "what", flag_value="merged", help="The whole model, merged first.")
@click.option("--gguf", "kind", metavar="TYPE", help="A GGUF file, f16, bf16 or q8_0, with its Modelfile.")
@click.option("--repo", metavar="[OWNER/]NAME", help="[default: yours, named after the folder]")
@click.option("--public", is_flag=True, help="For everyone to see. [default: private]")
@base_option
@onto_option
@force_option
@check_option
def push(given, what, kind, repo, public, **merging):
    """Upload to the Hugging Face Hub with the login of `hf auth login`, with a model card.

    RUN may be a checkpoint of a run; a merged model's, an adapter's or a GGUF's folder is uploaded as it is.
    """
    from fitune.export.push import login, push, repository, what_to_push

    run = _run_or_nothing(given)
    repo = repository(repo, login(), given)
    make = what_to_push(given, run, merged=what == "merged", gguf=kind, **merging)
    click.echo(f"pushed: {push(given, make, repo, public=public)}")


def _eval_gguf(file: Path, data: Path | None) -> None:
    if data is None:
        raise UsageError(f"{file}: knows no held-out rows: give --data FOLDER, which prepare wrote")
    from fitune.training.evaluate_folder import print_report
    from fitune.training.evaluate_gguf import evaluate_gguf, leave

    print_report(evaluate_gguf(file, data))
    leave()


def _run_or_nothing(given: Path):
    """The run of a folder or checkpoint; None for an adapter's, a model's or a GGUF's folder."""
    others = ("adapter_config.json", "config.json", "*.gguf")
    return None if any(list(given.glob(name)) for name in others) else _run_or_checkpoint(given)


@cli.command(epilog="Example:  fitune report runs/tiny_qlora-cpu_2proc --compare runs/tiny_lora-cpu_2proc")
@click.argument("folders", metavar="RUN", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--compare", multiple=True, metavar="OTHER...", type=click.Path(path_type=Path), help="Further runs.")
@click.option("--price-per-hour", "price", type=click.FloatRange(min=0), help="Of all GPUs together, for the cost.")
def report(folders, compare, price):
    """One page of a run, RUN/report.html: curves, memory, answers, data, settings; needs no network.

    `train` writes it at the end, `eval` and `generate --test` write it again, with the price and the other runs of the
    last `report`. With --compare the curves, figures and differing settings of several runs stand beside each other.
    """
    from fitune.report.page import write_page

    run, *others = folders  # what follows `--compare OTHER` are further ones
    if others and not compare:
        raise UsageError(f"report is about one run: to see {others[0]} beside {run}, put --compare before it")
    click.echo(f"page: {write_page(run, (*compare, *others), price)}")


@cli.command(epilog="Example:  fitune completion bash >> ~/.bashrc")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell):
    """The completion script for a shell."""
    from click.shell_completion import get_completion_class

    program, variable = _completed_program()
    click.echo(f"# completes {'./' if program.endswith('.py') else ''}{program}")
    click.echo(get_completion_class(shell)(cli, {}, program, variable).source())


def _completed_program() -> tuple[str, str]:
    """The program that a shell completes, and the environment variable by which it asks."""
    return ("cli.py", "_CLI_PY_COMPLETE") if command().endswith(".py") else ("fitune", "_FITUNE_COMPLETE")


def _run_or_checkpoint(folder: Path):
    """The finished run of a folder, or that of a checkpoint, which then stands for the run's result."""
    if folder.absolute().parent.name != "checkpoints":
        run = runs.load(folder)
        if not run.result_folder.is_dir():
            raise UsageError(
                f"{run.result_folder}: no such folder; the run has not finished, continue it with --resume"
            )
        return run
    run = runs.load(folder.absolute().parents[1]).model_copy(update={"checkpoint": str(folder.absolute())})
    if not run.result_folder.is_dir():
        whole_model = "; checkpoints of method full only resume a run" if run.recipe.method == "full" else ""
        raise UsageError(
            f"{run.result_folder}: no such folder; give a run folder or a whole checkpoint of it{whole_model}"
        )
    from fitune.training.manifest import find_damage

    if damage := find_damage(folder):
        raise UsageError(f"{folder}: {damage}; give another checkpoint, or the run's folder")
    return run


def _check_place(run, place: dict) -> None:
    """Raises UsageError where this machine is not told its place among several."""
    from fitune.launching.machines import check_machine_flags

    check_machine_flags(run, **place)


def _check_data(run, *, asked_as_trained: bool = False, reads_rows: bool = True) -> None:
    """Raises UsageError for rows that were prepared otherwise than the run's recipe says; says whose they are.

    With `asked_as_trained` also for a template or system message that the run's result was not trained with.
    """
    from fitune.config.hub import local_config
    from fitune.data.dataset import load_tokenizer
    from fitune.data.prepared import check_prepared, dataset_in
    from fitune.export.chat_record import refuse_another_chat

    data, base = run.recipe.data, run.recipe.base
    if reads_rows and (prepared_from := dataset_in(Path(data.prepared), data)):
        click.echo(f"data: {data.prepared}, prepared from {prepared_from}")
    tokenizer = load_tokenizer(run.recipe, local_config(base.model, base.revision))
    if asked_as_trained:
        refuse_another_chat(run, tokenizer)
    if reads_rows:
        check_prepared(run.recipe, tokenizer)


def _checkpoint_flag(run) -> list[str]:
    return ["--checkpoint", run.checkpoint] if run.checkpoint else []


def _run_to_continue(folder: Path, profile: str | None, sets: tuple[str, ...], output: str | None, resume: bool):
    """The run of a folder that was given in a recipe's place."""
    if not resume:
        raise UsageError(f"{folder} is a run's folder: add --resume to continue it, or give a recipe")
    if output:
        raise UsageError(f"{folder} is a run's folder, which is continued in place: remove --output {output}")
    return runs.resolve_again(folder, profile, sets)


def _fastest_here(recipe: str, sets: tuple[str, ...], output: str | None, resume: bool = False, machines: int = 1):
    """The run that is fastest on this machine, or that was when it was started; says what was chosen."""
    from fitune.launching.run_folder import found_before
    from fitune.planning.hardware import this_machine
    from fitune.planning.search import find

    machine = this_machine()
    if resume and output and (run := found_before(recipe, sets, Path(output), len(machine.gpus))):
        return run
    found = find(recipe, sets, machine, output=output, machines=machines)
    for line in (found.in_one_line(), found.why_idle(), machine.uneven):
        if line:
            click.echo(line, err=True)
    return found.plan.run


def _train(run, *, resume: bool, max_restarts: int, force: bool, **place) -> int:
    """Checks, then starts this machine's ranks, with those of other machines if there are some; the exit code."""
    from fitune.launching.launch import machine_flags, train_with_restarts
    from fitune.launching.machines import Machines
    from fitune.launching.preflight import check_before_training, fetch_base
    from fitune.launching.run_folder import open_run_folder

    several, rank = run.accelerate.num_machines > 1, place["machine_rank"] or 0
    with ExitStack() as stack:
        if not rank:
            check_before_training(run, force=force)
            _check_data(run)
            stack.enter_context(open_run_folder(run, resume))
        if several:
            machines = stack.enter_context(Machines(run, rank, resume))
            if rank:
                run, resume = machines.settings_of_machine_0(run), machines.resume
                check_before_training(run, force=force)
                _check_data(run)
        click.echo(_launch_line(run, "fitune.training.train", *(["--resume"] if resume else [])))
        fetch_base(run)
        if several:
            machines.start_together()
        return train_with_restarts(
            run, resume=resume, max_restarts=max_restarts, accelerate_flags=machine_flags(**place)
        )


def _launch_line(run, module: str, *arguments: str) -> str:
    from fitune.launching.launch import launch_line

    return shlex.join(launch_line(run, module, *arguments))


def _launch(run, module: str, *arguments: str, place: dict, **options) -> None:
    from fitune.launching.launch import launch_until_stopped, machine_flags

    code = launch_until_stopped(run, module, *arguments, accelerate_flags=machine_flags(**place), **options)
    if code:
        sys.exit(code)


def _show(run, machine_rank: int | None = None, **_) -> None:
    """The page of a run, with what the command has added; machine 0 writes it."""
    from fitune.report.page import page_after_a_command

    if not machine_rank:
        click.echo(page_after_a_command(run.folder), err=True)


def main() -> None:
    """What `fitune`, `python cli.py` and `python -m fitune` run."""
    name = remember(sys.argv[0])
    cli(prog_name=name, complete_var=_completed_program()[1])
