"""Arguments and options that several commands share."""

import math
from functools import wraps
from pathlib import Path

import click

from fitune.cli_completion import complete_key, complete_profile, complete_recipe
from fitune.errors import UsageError


class FiniteRange(click.FloatRange):
    """Finite numbers alone: click takes nan and inf."""

    def convert(self, value, param, ctx) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


ABOVE_0 = FiniteRange(min=0, min_open=True)
recipe_argument = click.argument("recipe", shell_complete=complete_recipe)
profile_option = click.option(
    "--profile",
    metavar="NAME",
    help="Memory profile (see `list`) or a .yaml file. [default: what is fastest on this machine]",
    shell_complete=complete_profile,
)
set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value: training.learning_rate=1e-4, lora.r=32, profile.micro_batch=2.",
    shell_complete=complete_key,
)
output_option = click.option("--output", type=click.Path(), help="Run folder. [default: runs/RECIPE-PROFILE]")
force_option = click.option("--force", is_flag=True, help="Go on even if the base may not be the adapter's own.")

price_option = click.option(
    "--price-per-hour", "price", metavar="PRICE", type=FiniteRange(min=0), help="Of all GPUs together."
)

load_option = click.option(
    "--load",
    metavar="WAY",
    type=click.Choice(["auto", "stored", "nf4"]),
    default="auto",
    show_default=True,
    help="A model folder's weights: stored (as they are), nf4 (4 bits), auto (what fits, as `plan FOLDER` says).",
)


def json_option(*names: str, help: str):
    """A file that is written at the end: what makes that impossible is said at the start."""

    def can_be_written(context, parameter, file: Path | None) -> Path | None:
        if file and (file.is_dir() or not file.absolute().parent.is_dir()):
            wrong = "is a folder" if file.is_dir() else f"there is no folder {file.parent}"
            raise UsageError(f"--json {file}: {wrong}; name a file")
        return file

    return click.option("--json", *names, type=click.Path(path_type=Path), callback=can_be_written, help=help)


def one_dataset(context, parameter, values: tuple[str, ...]) -> str | None:
    """The value of --dataset: of several click alone would take the last, without a word."""
    if len(values) > 1:
        raise UsageError(f"{parameter.opts[0]} is given {len(values)} times; give one: several are a recipe's data.mix")
    return values[0] if values else None


def several(*options):
    """Adds all of them to a command; `--help` shows them in this order."""

    def add(command):
        for option in reversed(options):
            command = option(command)
        return command

    return add


merge_options = several(
    click.option(
        "--base",
        metavar="MODEL",
        type=click.Path(),
        help="Merge into this model: the bf16 original of an NF4 base (with --force).",
    ),
    click.option(
        "--onto",
        metavar="BASE",
        type=click.Choice(["trained", "original"]),
        help="Add the adapter to the weights it was trained beside (trained; of qlora in NF4), or to the base's own "
        "(original).",
    ),
    force_option,
    click.option(
        "--check/--no-check",
        default=True,
        help="Compare what was written with base plus adapter on a few held-out prompts. [default: check]",
    ),
)


def machine_options(command):
    """The flags by which each of several machines is told its place, which the command gets as one dict."""

    @several(
        click.option(
            "--machine-rank",
            type=click.IntRange(min=0),
            metavar="N",
            help="This one among several machines.",
        ),
        click.option("--main-process-ip", metavar="ADDRESS", help="Address of machine 0."),
        click.option("--main-process-port", type=click.IntRange(1, 65535), metavar="PORT", help="A port on machine 0."),
    )
    @wraps(command)
    def with_place(*, machine_rank, main_process_ip, main_process_port, **options):
        place = {
            "machine_rank": machine_rank,
            "main_process_ip": main_process_ip,
            "main_process_port": main_process_port,
        }
        return command(place=place, **options)

    return with_place
