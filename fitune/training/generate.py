"""Answers from the base and the tuned model of a run, or from a merged model.

    accelerate launch --config_file X.yaml -m fitune.training.generate RUN --prompt "..."

A run's model is sharded as in training, so what could be trained can be asked; a model folder is loaded by plain
transformers on one device.
"""

import argparse
import contextlib
import json
import random
import secrets
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from fitune.config.hub import local_folder
from fitune.config.schema import Run
from fitune.data.chat_template import end_of_turn_ids, read_tokenizer
from fitune.data.conversations import for_template
from fitune.data.dataset import load_tokenizer
from fitune.data.file_formats import first_line
from fitune.data.prepared import check_prepared, first_rows
from fitune.errors import UsageError
from fitune.export.chat_record import read_chat_record, refuse_another_chat
from fitune.model.sharding import computes_on
from fitune.model.skeleton import decoder
from fitune.report.run_files import ANSWERS
from fitune.training.chat import Interrupts, chat
from fitune.training.distributed import compute_device, is_main_process, join, leave
from fitune.training.out_of_memory import explain_in_generate
from fitune.training.train import load_sharded_model, run_stage
from fitune.training.tuned import load_tuned_weights, tuned_base_folder

Asked = tuple[list[dict] | str, list | None]
"A conversation up to the turn that is wanted, and the tools that may be called in it; or a text to go on with."


class Answerer:
    """A model, its tokenizer and the tokens at which an answer ends."""

    def __init__(
        self,
        model,
        tokenizer,
        stop_ids: list[int],
        device,
        max_new_tokens: int,
        temperature: float,
        seed: int | None = None,
    ):
        """At a `temperature` every answer is drawn anew, and the same again for the same `seed`."""
        self.model, self.tokenizer, self.device = model.eval(), tokenizer, device
        self.seeds = random.Random(shared_seed() if seed is None and temperature > 0 else seed)
        self.options = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": stop_ids,
            "do_sample": temperature > 0,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if temperature > 0:
            self.options["temperature"] = temperature

    @torch.no_grad()
    def answer(self, asked: list[dict] | str, tools: list | None = None, streamer=None, stopping=None) -> str:
        """The next assistant turn, or how a text goes on. On a sharded model every rank must ask the same."""
        inputs = self._tokens(asked, tools).to(self.device)
        if self.options["do_sample"]:
            torch.manual_seed(self.seeds.getrandbits(48))  # all ranks must draw the same token
        output = self.model.generate(**inputs, **self.options, streamer=streamer, stopping_criteria=stopping)
        new_tokens = output[0, inputs["input_ids"].shape[1] :]
        return self.tokenizer.decode(new_tokens, skip_special_tokens=True).strip()

    def _tokens(self, asked: list[dict] | str, tools: list | None):
        if isinstance(asked, str):
            return self.tokenizer(
                (self.tokenizer.bos_token or "") + asked, add_special_tokens=False, return_tensors="pt"
            )
        return self.tokenizer.apply_chat_template(
            asked, tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )


def shared_seed() -> int:
    """A random number, the same on all ranks."""
    number = [secrets.randbits(48)]
    if dist.is_initialized():
        dist.broadcast_object_list(number)
    return number[0]


def generate(run: Run, options: argparse.Namespace) -> None:
    """Prints (and with --json writes) the answers of base and tuned model, or holds a conversation with the tuned."""
    interrupts = Interrupts() if options.chat else None
    mesh = join(run.accelerate)
    base_folder = local_folder(run.recipe.base.model, run.recipe.base.revision)
    tokenizer = load_tokenizer(run.recipe, base_folder)
    refuse_another_chat(run, tokenizer)
    if options.test:
        check_prepared(run.recipe, tokenizer)
    stop_ids = end_of_turn_ids(tokenizer)
    tuned_folder = tuned_base_folder(run, base_folder, options.force)

    def load(folder: Path) -> Answerer:
        model = load_sharded_model(run, folder, tokenizer, mesh)
        load_tuned_weights(run, model, mesh)
        dist.fsdp.register_fsdp_forward_method(model, "generate")
        computes_on(decoder(model), compute_device(mesh))
        drawn = options.max_new_tokens, options.temperature, options.seed
        return Answerer(model, tokenizer, stop_ids, compute_device(mesh), *drawn)

    answerer = load(tuned_folder if options.chat else base_folder)
    if options.chat:
        chat(answerer, run.recipe.data.system_message, interrupts)
    else:
        conversations = _conversations(run, options)
        adapter_off = getattr(answerer.model, "disable_adapter", contextlib.nullcontext)
        with adapter_off():
            base_answers = [answerer.answer(*asked) for asked in conversations]
        if tuned_folder != base_folder:
            answerer = load(tuned_folder)
        tuned_answers = [answerer.answer(*asked) for asked in conversations]
        if is_main_process():
            answers = {"base": base_answers, "tuned": tuned_answers}
            _report(conversations, answers, options.json)
            if options.test and not run.checkpoint:
                _keep_held_out(run, options, conversations, answers)
    leave()


def _conversations(run: Run, options: argparse.Namespace) -> list[Asked]:
    """What --prompt and --text say, then the first N held-out conversations up to their last answer."""
    asked = _questions(options, run.recipe.data.system_message)
    for row in first_rows(run.recipe, "test", options.test):
        if "text" in row:
            raise UsageError(f"{run.recipe.data.prepared}/test.jsonl: holds texts, not questions; ask with --text")
        messages, tools = for_template(row)
        asked.append((messages[:-1], tools))
    return asked


def _questions(options: argparse.Namespace, system_message: str | None) -> list[Asked]:
    start = [{"role": "system", "content": system_message}] if system_message else []
    questions = [[*start, {"role": "user", "content": prompt}] for prompt in options.prompt]
    return [(asked, None) for asked in (*questions, *options.text)]


def generate_from_model(folder: Path, options: argparse.Namespace) -> None:
    """Answers from a merged (or any chat) model folder, loaded by transformers on one device.

    One that fitune trained is asked with the system message that it was trained with.
    """
    from transformers import AutoModelForCausalLM

    interrupts = Interrupts() if options.chat else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = read_tokenizer(folder)
    if (options.prompt or options.chat) and not tokenizer.chat_template:
        raise UsageError(f"{folder}: has no chat template, as base models have none; give it --text to go on with")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map=device, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:  # no safetensors, or an architecture that brings code of its own
        raise UsageError(f"{folder}: cannot be loaded: {first_line(error)}") from None
    stop_ids = model.generation_config.eos_token_id
    drawn = options.max_new_tokens, options.temperature, options.seed
    answerer = Answerer(model, tokenizer, stop_ids, device, *drawn)
    record = read_chat_record(folder)
    system_message = record.system_message if record else None
    if options.chat:
        chat(answerer, system_message, interrupts)
        return
    conversations = _questions(options, system_message)
    _report(conversations, {"model": [answerer.answer(*asked) for asked in conversations]}, options.json)


def _report(conversations: list[Asked], answers: dict[str, list[str]], json_file: Path | None) -> None:
    table = Table(show_lines=True)
    for column in ("prompt", *answers):
        table.add_column(column, overflow="fold")
    for i, (asked, _) in enumerate(conversations):
        table.add_row(
            asked if isinstance(asked, str) else asked[-1]["content"], *(texts[i] for texts in answers.values())
        )
    Console().print(table, markup=False)
    if json_file:
        rows = [
            ({"text": asked} if isinstance(asked, str) else {"messages": asked})
            | ({"tools": tools} if tools else {})
            | {label: texts[i] for label, texts in answers.items()}
            for i, (asked, tools) in enumerate(conversations)
        ]
        json_file.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _keep_held_out(
    run: Run, options: argparse.Namespace, conversations: list[Asked], answers: dict[str, list[str]]
) -> None:
    """answers.json in the run's folder, for its page: the held-out prompts, their answers, and those in the data."""
    rows = first_rows(run.recipe, "test", options.test)
    start = len(conversations) - len(rows)  # those of --prompt and --text come before
    kept = [
        {"messages": conversations[start + i][0]}
        | {label: texts[start + i] for label, texts in answers.items()}
        | {"expected": for_template(row)[0][-1].get("content")}
        for i, row in enumerate(rows)
    ]
    content = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "rows": kept}
    (run.folder / ANSWERS).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fitune.training.generate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, or a merged model's folder")
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--text", action="append", default=[], help="go on with this text, without a template")
    parser.add_argument("--test", type=int, default=0, help="ask the first N held-out prompts")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 decodes greedily")
    parser.add_argument("--seed", type=int, help="draws the same answers again")
    parser.add_argument("--force", action="store_true", help="on a base that may not be the adapter's own, too")
    parser.add_argument("--checkpoint", help="a checkpoint of the run, instead of its result")
    parser.add_argument("--json", type=Path, help="also write the answers to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    run_stage(options.run, lambda run: generate(run, options), explain_in_generate, checkpoint=options.checkpoint)


if __name__ == "__main__":
    main()
