"""The commands for what was trained, or is to be: ask it, measure it, write it for others.

Nothing heavy is imported before a command needs it.
"""

import shlex
import sys
from functools import partial
from pathlib import Path

import click

from fitune.cli_completion import complete_result
from fitune.cli_group import Command
from fitune.cli_options import (
    FiniteRange,
    force_option,
    json_option,
    load_option,
    machine_options,
    merge_options,
    price_option,
)
from fitune.columns import short
from fitune.config.command_name import command
from fitune.errors import UsageError

_command = partial(click.command, cls=Command)


@_command(
    "eval",
    short_help="Loss and accuracy on held-out rows, base against tuned.",
    epilog="eval runs/tiny_qlora-cpu_2proc\neval models/mine --data data/mine",
)
@click.argument("given", metavar="RUN|FOLDER", type=click.Path(path_type=Path), shell_complete=complete_result)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Rows to measure on: a folder that prepare wrote, or its .jsonl. [default: the run's held-out rows]",
)
@click.option("--tasks", metavar="NAME,…", help="lm-eval's tasks instead, on the merged model, such as hellaswag.")
@click.option("--include", type=click.Path(path_type=Path), help="A folder with task files of your own, for --tasks.")
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Only so many rows of each task.")
@json_option("file", help="Also write the tasks' figures to this file.")
@load_option
@force_option
@machine_options
def evaluate(given, data, **options):
    """Loss, perplexity and token accuracy on the test split, base against tuned.

    RUN may be one of its checkpoints, RUN/checkpoints/checkpoint-N. The folder of a merged model or of an adapter is
    measured by itself, a model on as many GPUs as it takes, a .gguf file by llama.cpp; these need --data.
    """
    from fitune.training.eval_command import eval_command

    sys.exit(eval_command(given, data, **options))


@_command(
    short_help="Answers from base and tuned model; a conversation.",
    epilog='generate runs/tiny_qlora-cpu_2proc --prompt "Name a colour."\ngenerate models/mine --chat',
)
@click.argument("given", metavar="RUN|MODEL", type=click.Path(path_type=Path), shell_complete=complete_result)
@click.option("--prompt", metavar="TEXT", multiple=True, help="Ask this; may be repeated.")
@click.option("--text", multiple=True, help="Go on with this text, without a chat template; may be repeated.")
@click.option("--test", metavar="N", type=click.IntRange(min=1), help="Ask the first N held-out prompts.")
@click.option("--chat", is_flag=True, help="A conversation with the tuned model.")
@click.option(
    "--serve", type=click.IntRange(1, 65535), metavar="PORT", help="Serve it with vLLM, a GGUF with llama.cpp."
)
@click.option(
    "--max-new-tokens", metavar="N", type=click.IntRange(min=1), default=256, show_default=True, help="Of an answer."
)
@click.option(
    "--temperature",
    metavar="T",
    type=FiniteRange(min=0),
    default=0.0,
    show_default=True,
    help="0 decodes greedily.",
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(min=0),
    help="Draw the same answers again. [default: other ones each time]",
)
@json_option(help="Also write the answers to this file.")
@load_option
@force_option
@machine_options
def generate(given, **options):
    """Answers from base and tuned model side by side, or from a merged model.

    RUN may also be a checkpoint, RUN/checkpoints/checkpoint-N, or an adapter's folder. A model that is larger
    than a GPU goes over several, into 4 bits or into host RAM: `plan MODEL` says how.
    """
    from fitune.training.generate_command import generate_command

    sys.exit(generate_command(given, **options))


@_command(
    short_help="One page of a run: curves, memory, answers, data, settings.",
    epilog="report runs/first\nreport runs/first --compare runs/second runs/third",
)
@click.argument(
    "folders", metavar="RUN", nargs=-1, required=True, type=click.Path(path_type=Path), shell_complete=complete_result
)
@click.option(
    "--compare",
    multiple=True,
    metavar="OTHER...",
    type=click.Path(path_type=Path),
    help="Further runs.",
    shell_complete=complete_result,
)
@price_option
def report(folders, compare, price):
    """One page of a run, RUN/report.html: curves, memory, answers, data, settings; needs no network.

    `train` writes it at the end, `eval` and `generate --test` write it again, with the price and the other runs of the
    last `report`. With --compare the curves, figures and differing settings of several runs stand beside each other.
    """
    from fitune.report.page import write_page

    run, *others = folders  # what follows `--compare OTHER` are further ones
    if others and not compare:
        raise UsageError(f"report is about one run: to see {others[0]} beside {run}, put --compare before it")
    click.echo(f"page: {short(str(write_page(run, (*compare, *others), price)))}")


@_command(
    short_help="Write a standard Hugging Face model from a run.",
    epilog="merge runs/tiny_qlora-cpu_2proc --output models/mine",
)
@click.argument("run_or_adapter", metavar="RUN", type=click.Path(path_type=Path), shell_complete=complete_result)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New folder for the model.")
@merge_options
def merge(run_or_adapter, output, base, onto, force, check):
    """A standard Hugging Face model from a run, or from RUN/checkpoints/checkpoint-N.

    RUN may also be the folder of any PEFT LoRA adapter; --base says what it was trained on.
    """
    options = {"base": base, "onto": onto, "force": force, "check": check}
    if (run_or_adapter / "adapter_config.json").is_file():
        from fitune.export.merge import merge_folder

        merge_folder(run_or_adapter, output, **options)
    else:
        from fitune.training.given_run import finished_run

        run = finished_run(run_or_adapter)
        from fitune.export.merge import merge_run

        merge_run(run, output, **options)
    click.echo(f'merged: {output}\nnext:   {command("generate", output)} --prompt "..."')


@_command(
    short_help="Write a bf16 model in 4 bits, once, for quick starts.",
    epilog="quantize meta-llama/Meta-Llama-3-70B --output models/70b-nf4",
)
@click.argument("model", type=click.Path())
@click.option("--revision", metavar="NAME", help="Branch, tag or commit on the Hub.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--check/--no-check",
    default=True,
    help="Compare what was written with the model in NF4 on a few prompts. [default: check]",
)
def quantize(model, revision, output, check):
    """A bf16 model in bitsandbytes' NF4 format, written once; then train with --set base.model=OUTPUT."""
    from fitune.config.hub import local_folder
    from fitune.output_folder import refuse_existing

    refuse_existing(output)
    folder = local_folder(model, revision)
    import torch

    from fitune.export.check_nf4 import check_nf4
    from fitune.weights.quantize import quantize as write_nf4

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks = {"check": partial(check_nf4, base=folder, device=device)} if check else {}
    write_nf4(folder, output, device, **checks)
    click.echo(f"{output}: train on it with --set {shlex.quote(f'base.model={output}')}")


@_command(
    short_help="Write a GGUF file for llama.cpp and Ollama.",
    epilog="export runs/llama3_8b_qlora-single_gpu --gguf bf16\nexport models/mine --gguf bf16 --quantize q4_k_m",
)
@click.argument("given", metavar="RUN|MODEL", type=click.Path(path_type=Path), shell_complete=complete_result)
@click.option("--gguf", "kind", required=True, metavar="TYPE", help="f16, bf16 or q8_0.")
@click.option("--quantize", "smaller", metavar="TYPE", help="Then make this of it with llama-quantize, such as q4_k_m.")
@click.option("--output", type=click.Path(path_type=Path), help="New folder. [default: RUN-gguf-TYPE]")
@merge_options
def export(given, kind, smaller, output, **merging):
    """A GGUF file for llama.cpp, LM Studio and Ollama, whose Modelfile is written beside it.

    RUN is merged first; it may be a checkpoint of a run, a LoRA adapter's folder, or a merged model.
    """
    from fitune.export.gguf import export_gguf, refuse_impossible
    from fitune.export.whole_model import whole_model
    from fitune.training.given_run import finished_run_or_none

    output = output or given.absolute().parent / f"{given.absolute().name}-gguf-{kind}"
    refuse_impossible(kind, smaller, output)
    model = whole_model(given, finished_run_or_none(given), **merging)
    files = export_gguf(model, output, kind, smaller)
    click.echo("\n".join(f"exported: {file}" for file in files))
    click.echo(f"next:     ollama create NAME -f {shlex.quote(str(output / 'Modelfile'))}")


@_command(
    short_help="Upload a result to the Hugging Face Hub.",
    epilog="push runs/llama3_8b_qlora-single_gpu\npush runs/llama3_8b_qlora-single_gpu --merged --repo my-llama",
)
@click.argument("given", metavar="RUN|FOLDER", type=click.Path(path_type=Path), shell_complete=complete_result)
@click.option(
    "--adapter",
    "what",
    flag_value="adapter",
    help="The adapter, or the whole model where all of it was trained. [default]",
    default=True,
)
@click.option("--merged", "what", flag_value="merged", help="The whole model, merged first.")
@click.option("--gguf", "kind", metavar="TYPE", help="A GGUF file, f16, bf16 or q8_0, with its Modelfile.")
@click.option("--repo", metavar="[OWNER/]NAME", help="[default: yours, named after the folder]")
@click.option("--public", is_flag=True, help="For everyone to see. [default: private]")
@merge_options
def push(given, what, kind, repo, public, **merging):
    """Upload to the Hugging Face Hub with the login of `hf auth login`, with a model card.

    RUN may be a checkpoint of a run; a merged model's, an adapter's or a GGUF's folder is uploaded as it is.
    """
    from fitune.export.push import login, push, repository, what_to_push
    from fitune.training.given_run import finished_run_or_none

    run = finished_run_or_none(given)
    repo = repository(repo, login(), given)
    make = what_to_push(given, run, merged=what == "merged", gguf=kind, **merging)
    click.echo(f"pushed: {push(given, make, repo, public=public)}")


RESULT_COMMANDS = [evaluate, generate, report, merge, quantize, export, push]
"In the order of the work."
