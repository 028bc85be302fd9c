"""What `fitune generate` does: answers of a run on all its ranks, of a folder where it fits, or a server's."""

import sys
import tempfile
from pathlib import Path

from fitune.config.gguf_files import SUFFIX
from fitune.errors import UsageError
from fitune.launching.launch import Place, launch_until_stopped
from fitune.launching.machines import check_machine_flags, refuse_machine_flags
from fitune.launching.roll_call import launch_together
from fitune.planning.asked_folder import is_asked_as_folder
from fitune.report.page import show_page_after_a_command
from fitune.training.asked_here import held_here
from fitune.training.given_run import check_data, checkpoint_flag, finished_run, finished_run_or_none


def generate_command(given: Path, *, serve: int | None, place: Place, **asked) -> int:
    """The exit code; `asked` are the flags of what is asked and how, `place` this machine's among several.

    Raises UsageError where nothing can be asked.
    """
    _refuse_ignored_flags(serve, **asked)
    _refuse_no_text(prompt=asked["prompt"], text=asked["text"])
    if serve:
        refuse_machine_flags(given, **place)
        return _serve(given, serve)
    load = asked.pop("load")
    if not any(asked[flag] for flag in ("prompt", "text", "test", "chat")):
        raise UsageError('nothing to ask: give --prompt "...", --text "...", --test N or --chat')
    if is_asked_as_folder(given):
        refuse_machine_flags(given, **place)
        return _ask_model(given, asked, load)
    if load != "auto":
        raise UsageError(f"--load {load}: a run is asked as it was trained; --load is for folders of models")
    return _ask_run(given, asked, place)


def _refuse_ignored_flags(
    serve: int | None, *, prompt, text, test, chat, json, temperature, seed, load, force, **_
) -> None:
    """UsageError for a flag that would do nothing beside others."""
    asks = {"--prompt": prompt, "--text": text, "--test": test, "--json": json}
    asks = [flag for flag, is_given in asks.items() if is_given]
    of_answers = {"--chat": chat, "--temperature": temperature, "--seed": seed is not None}
    of_weights = {"--load": load != "auto", "--force": force}
    if serve and (ignored := [*asks, *(flag for flag, is_given in (of_answers | of_weights).items() if is_given)]):
        why = "holds the model by itself" if ignored[0] in of_weights else "is asked over its port"
        raise UsageError(f"--serve starts a server, which {why}: leave out {ignored[0]}")
    if chat and asks:
        kept = "; /save FILE writes the conversation down" if asks == ["--json"] else ""
        raise UsageError(f"--chat is asked at its prompt: leave out {asks[0]}, or --chat{kept}")
    if seed is not None and not temperature:
        raise UsageError("--seed is for answers that are drawn: add --temperature T, above 0, or leave it out")


def _refuse_no_text(**typed: tuple[str, ...]) -> None:
    """UsageError for bytes of a shell that are no UTF-8, which no tokenizer takes."""
    for name, values in typed.items():
        for value in values:
            try:
                value.encode()
            except UnicodeEncodeError:
                raise UsageError(f"--{name} {value!a} is not UTF-8: set the terminal's encoding to UTF-8") from None


def _serve(given: Path, port: int) -> int:
    from fitune.export.serve import notes_on, serve, server_command

    run = None if given.suffix == SUFFIX and given.is_file() else finished_run_or_none(given)
    command = server_command(given, run, port)
    for note in notes_on(given, run):
        print(note, file=sys.stderr)
    serve(command)
    return 0


def _ask_model(folder: Path, asked: dict, load: str) -> int:
    if asked["test"]:
        raise UsageError(f"{folder} is no run's folder: --test needs a run, which knows its held-out rows")
    from fitune.training.given_model import given_model
    from fitune.training.model_run import how_to_hold, run_to_ask

    given = given_model(folder, force=asked["force"])
    if asked["prompt"] or asked["chat"]:
        given.check_can_be_asked("give it --text to go on with")
    if way := how_to_hold(given, load):
        with tempfile.TemporaryDirectory(prefix="fitune-") as scratch:
            run, chats = run_to_ask(given, way, Path(scratch)), bool(asked["chat"])
            module = "fitune.training.generate_model"
            return launch_until_stopped(run, module, *_as_typed(asked), interrupts_go_on=chats)
    from fitune.training.asked import parse_options
    from fitune.training.generate_model import generate_from_model

    generate_from_model(given, parse_options([str(folder), *_as_typed(asked)]))
    return 0


def _ask_run(folder: Path, asked: dict, place: Place) -> int:
    run = finished_run(folder, asked=True)
    check_machine_flags(run, **place)
    check_data(run, asked_as_trained=True, reads_rows=bool(asked["test"]))
    with held_here(run) as held:
        words = [*checkpoint_flag(run), *held.flags, *_as_typed(asked)]
        options = {"config": held.config, "place": place, "interrupts_go_on": bool(asked["chat"])}
        code = launch_together(run, "fitune.training.generate", *words, **options)
    if asked["test"] and not code:
        show_page_after_a_command(run.folder, place)
    return code


def _as_typed(asked: dict) -> list[str]:
    """The flags, for `parse_options` of fitune/training/generate.py."""
    words = []
    for name, value in asked.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:  # with "=", as a prompt may begin with "-"
            words += [f"{flag}={each}" for each in (value if isinstance(value, tuple) else [value])]
    return words
