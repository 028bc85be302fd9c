"""How the command line looks: examples as the user would type them, an expected error as one line."""

import re

import click

from fitune import environment
from fitune.config.command_name import command
from fitune.errors import INTERRUPTED, STOPPED_BY_CTRL_C, FituneError, is_out_of_memory


class Command(click.Command):
    """A command whose epilog is its examples, a line each: shown as the user would type them."""

    def format_epilog(self, ctx, formatter) -> None:
        examples = self.epilog.splitlines()
        with formatter.section("Examples" if examples[1:] else "Example"):
            for example in examples:
                formatter.write(f"  {command()} {example}\n")


class Cli(Command, click.Group):
    """Prints an expected error, click's own too, as one line and exits with its code. So with Ctrl-C.

    --debug shows the traceback.
    """

    command_class = Command

    def list_commands(self, ctx) -> list[str]:
        """In the order of the work, not of the alphabet."""
        return list(self.commands)

    def format_epilog(self, ctx, formatter) -> None:
        super().format_epilog(ctx, formatter)
        with formatter.section("Environment variables"):
            formatter.write_dl(list(environment.MEANINGS.items()))

    def make_context(self, *args, **kwargs):
        try:
            return super().make_context(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:  # in what stands before a command's name
            line, code = in_one_line(error, None)
            click.echo(line, err=True)
            raise click.exceptions.Exit(code) from None

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (FituneError, click.UsageError, KeyboardInterrupt, RuntimeError, MemoryError, OSError) as error:
            line, code = in_one_line(error, ctx.invoked_subcommand)
            if line is None or ctx.params.get("debug"):
                raise
            click.echo(line, err=True)
            ctx.exit(code)


def in_one_line(error: BaseException, command_name: str | None) -> tuple[str | None, int]:
    """What to print for an error, None where nobody expected it, and the exit code."""
    if isinstance(error, FituneError):
        return f"error: {error}", error.exit_code
    if isinstance(error, click.UsageError):
        return f"error: {_as_ours(error, command_name)}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        if command_name == "train":
            return "stopped: before the first step, with nothing to save", INTERRUPTED
        return "stopped", STOPPED_BY_CTRL_C
    if is_out_of_memory(error):
        from fitune.training.out_of_memory import explain_in_one_process

        return f"error: {explain_in_one_process(error)}", FituneError.exit_code
    if isinstance(error, OSError) and error.filename and error.strerror:  # a folder in a file's place, for one
        return f"error: {error.filename}: {error.strerror}", FituneError.exit_code
    return None, 1


def _commands(ctx: click.Context | None) -> list[str]:
    """The names that lead from the program to the command of `ctx`."""
    return [*_commands(ctx.parent), ctx.info_name] if ctx and ctx.parent else []


def _as_ours(error: click.UsageError, command_name: str | None) -> str:
    """Click's message in the form of fitune's: one that says no nearest name says where the names are."""
    words = _commands(error.ctx) or filter(None, [command_name])
    message = " ".join(error.format_message().split()).rstrip(".")  # click lists choices on lines of their own
    message = re.sub(r"\. \(?Did you mean (?:one of: )?(.*?)[?)]*$", r"; did you mean \1?", message)
    where = f"; see `{command(*words)} --help`" * (not message.endswith("?"))
    return f"{message[0].lower()}{message[1:]}{where}"
