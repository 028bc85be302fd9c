"""Answers from the folder of a merged model, or any other that chats: on one device, or held by several processes.

    accelerate launch --config_file X.yaml -m fitune.training.generate_model RUN --prompt "..."

RUN is a folder that `model_run.run_to_ask` wrote. One that fitune trained is asked with the system message that it was
trained with.
"""

import argparse
from pathlib import Path

import torch
from transformers import GenerationConfig

from fitune.config.schema import Run
from fitune.data.chat_template import read_tokenizer
from fitune.data.file_formats import first_line
from fitune.errors import UsageError
from fitune.export.chat_record import read_chat_record
from fitune.model.skeleton import decoder
from fitune.training.answerer import Answerer, made_to_generate
from fitune.training.asked import parse_options, questions, report
from fitune.training.chat import Interrupts, chat
from fitune.training.distributed import compute_device, is_main_process, join, leave
from fitune.training.out_of_memory import explain_in_generate
from fitune.training.train import load_sharded_model, run_stage


def generate_from_model(folder: Path, options: argparse.Namespace) -> None:
    """Loaded by plain transformers on one device."""
    from transformers import AutoModelForCausalLM

    interrupts = Interrupts() if options.chat else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = _tokenizer(folder, options)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map=device, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:  # no safetensors, or an architecture that brings code of its own
        raise UsageError(f"{folder}: cannot be loaded: {first_line(error)}") from None
    _ask(folder, model, tokenizer, device, options, interrupts)


def generate_from_shards(run: Run, options: argparse.Namespace) -> None:
    """The run's base, without an adapter. Call on all ranks."""
    interrupts = Interrupts() if options.chat else None
    mesh, folder = join(run), Path(run.recipe.base.model)
    device, tokenizer = compute_device(mesh), _tokenizer(folder, options)
    model = load_sharded_model(run, folder, tokenizer, mesh, adapter=False)
    decoder(model).generation_config = _generation_config(folder)
    _ask(folder, made_to_generate(model, device), tokenizer, device, options, interrupts)
    leave()


def _tokenizer(folder: Path, options: argparse.Namespace):
    tokenizer = read_tokenizer(folder)
    if (options.prompt or options.chat) and not tokenizer.chat_template:
        raise UsageError(f"{folder}: has no chat template, as base models have none; give it --text to go on with")
    return tokenizer


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # a folder without one: its config.json says what transformers would take
        from transformers import AutoConfig

        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))


def _ask(folder: Path, model, tokenizer, device, options: argparse.Namespace, interrupts: Interrupts | None) -> None:
    stop_ids = model.generation_config.eos_token_id
    answerer = Answerer(model, tokenizer, stop_ids, device, options.max_new_tokens, options.temperature, options.seed)
    record = read_chat_record(folder)
    system_message = record.system_message if record else None
    if options.chat:
        chat(answerer, system_message, interrupts)
        return
    conversations = questions(options, system_message)
    answers = answerer.answers(conversations)
    if is_main_process():
        report(conversations, {"model": answers}, options.json)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    run_stage(options.run, lambda run: generate_from_shards(run, options), explain_in_generate)


if __name__ == "__main__":
    main()
