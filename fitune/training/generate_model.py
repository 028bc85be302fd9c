"""Answers from the folder of a model, or of an adapter beside its base: on one device, or held by several processes.

    accelerate launch --config_file X.yaml -m fitune.training.generate_model RUN --prompt "..."

RUN is a folder that `model_run.run_to_ask` wrote. One that fitune trained is asked with the system message that it was
trained with.
"""

import argparse
import sys

from fitune.config.json_file import read_json
from fitune.config.schema import Run
from fitune.model.skeleton import decoder
from fitune.training.answerer import Answerer, made_to_generate, refuse_longer_than_the_model
from fitune.training.asked import parse_options, questions, report
from fitune.training.chat import Interrupts, chat
from fitune.training.distributed import as_rank, close_process_group, compute_device, is_main_process, join
from fitune.training.given_model import GivenModel, model_of
from fitune.training.load_given import load_over_processes, load_plain
from fitune.training.out_of_memory import explain_in_generate
from fitune.training.train import run_stage


def generate_from_model(given: GivenModel, options: argparse.Namespace) -> None:
    """Loaded by plain transformers and PEFT on one device."""
    interrupts = Interrupts() if options.chat else None
    _refuse_what_has_no_room(given, options)
    tokenizer = given.tokenizer()
    model = load_plain(given)
    _ask(given, model, tokenizer, next(model.parameters()).device, options, interrupts)


def generate_over_processes(run: Run, options: argparse.Namespace) -> None:
    """As `run`, which `model_run.run_to_ask` wrote, says. Call on all ranks."""
    interrupts = Interrupts() if options.chat else None
    mesh, given = join(run), model_of(run)
    _refuse_what_has_no_room(given, options)
    device, tokenizer = compute_device(mesh), given.tokenizer()
    model = made_to_generate(load_over_processes(run, given, mesh), device)
    _ask(given, model, tokenizer, device, options, interrupts)
    close_process_group()


def _refuse_what_has_no_room(given: GivenModel, options: argparse.Namespace) -> None:
    refuse_longer_than_the_model(options.max_new_tokens, read_json(given.base / "config.json", "get the model again"))


def _ask(given: GivenModel, model, tokenizer, device, options: argparse.Namespace, interrupts: Interrupts | None):
    decoder(model).generation_config = generation = given.generation_config()
    drawn = options.max_new_tokens, options.temperature, options.seed
    answerer = Answerer(model, tokenizer, generation.eos_token_id, device, *drawn)
    if options.chat:
        chat(answerer, given.system_message, interrupts)
        return
    conversations, answers = questions(options, given.system_message), {}
    if given.trains_biases:
        print(f"{given.folder}: trained biases of the base, so this one is not asked: {given.base}", file=sys.stderr)
    elif given.is_adapter:
        with model.disable_adapter():
            answers["base"] = answerer.answers(conversations)
    answers["tuned" if given.is_adapter else "model"] = answerer.answers(conversations)
    if is_main_process():
        report(conversations, answers, options.json)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    run_stage(options.run, lambda run: generate_over_processes(run, options), explain_in_generate)


if __name__ == "__main__":
    as_rank(main)
