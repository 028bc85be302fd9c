"""Answers from the base and the tuned model of a run.

    accelerate launch --config_file X.yaml -m fitune.training.generate RUN --prompt "..."

The model is sharded as in training, so what could be trained can be asked.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from fitune.config.hub import local_folder
from fitune.config.json_file import read_json
from fitune.config.schema import Run
from fitune.data.chat_template import end_of_turn_ids
from fitune.data.conversations import for_template
from fitune.data.dataset import load_tokenizer
from fitune.data.prepared import check_prepared, first_rows
from fitune.errors import UsageError
from fitune.export.chat_record import refuse_another_chat
from fitune.launching.finished import Measuring
from fitune.training.answerer import Answerer, made_to_generate, refuse_longer_than_the_model
from fitune.training.asked import Asked, parse_options, questions, report
from fitune.training.asked_here import as_held
from fitune.training.chat import Interrupts, chat
from fitune.training.distributed import as_rank, close_process_group, compute_device, is_main_process, join
from fitune.training.given_run import changed_split
from fitune.training.out_of_memory import explain_in_generate
from fitune.training.train import free_model_memory, load_sharded_model, run_stage
from fitune.training.tuned import load_tuned_weights, tuned_base_folder


def generate(run: Run, options: argparse.Namespace) -> None:
    """Prints (and with --json writes) the answers of base and tuned model, or holds a conversation with the tuned."""
    interrupts, measuring = Interrupts() if options.chat else None, Measuring(run.folder)
    mesh = join(run)
    base_folder = local_folder(run.recipe.base.model, run.recipe.base.revision)
    tokenizer = load_tokenizer(run.recipe, base_folder)
    refuse_another_chat(run, tokenizer)
    if options.test:
        check_prepared(run.recipe, tokenizer, is_trained=True)
    refuse_longer_than_the_model(options.max_new_tokens, read_json(base_folder / "config.json", "get the model again"))
    stop_ids = end_of_turn_ids(tokenizer)
    tuned_folder = tuned_base_folder(run, base_folder, options.force)

    has_adapter = run.recipe.method != "full"

    def load(*, tuned: bool) -> Answerer:
        model = load_sharded_model(run, tuned_folder if tuned else base_folder, tokenizer, mesh)
        if tuned:
            load_tuned_weights(run, model, mesh)
        made_to_generate(model, compute_device(mesh))
        drawn = options.max_new_tokens, options.temperature, options.seed
        return Answerer(model, tokenizer, stop_ids, compute_device(mesh), *drawn)

    answerer = load(tuned=has_adapter or options.chat)
    if options.chat:
        chat(answerer, run.recipe.data.system_message, interrupts)
    else:
        conversations = _conversations(run, options)
        adapter_off = getattr(answerer.model, "disable_adapter", contextlib.nullcontext)
        with adapter_off():
            base_answers = answerer.answers(conversations)
        if not has_adapter:  # one after the other, as GPUs have room for one
            del answerer
            free_model_memory()
            answerer = load(tuned=True)
        tuned_answers = answerer.answers(conversations)
        if is_main_process():
            answers = {"base": base_answers, "tuned": tuned_answers}
            report(conversations, answers, options.json)
            if options.test and not run.checkpoint and changed_split(run) is None:  # the page shows the run's own rows
                _keep_held_out(measuring.file("answers"), run, options, conversations, answers)
    close_process_group()


def _conversations(run: Run, options: argparse.Namespace) -> list[Asked]:
    """What --prompt and --text say, then the first N held-out conversations up to their last answer."""
    asked = questions(options, run.recipe.data.system_message)
    rows = first_rows(run.recipe, "test", options.test)
    if len(rows) < (options.test or 0) and is_main_process():
        print(
            f"note: {run.recipe.data.prepared}/test.jsonl has no more than {len(rows):,}, all are asked",
            file=sys.stderr,
        )
    for row in rows:
        if "text" in row:
            raise UsageError(f"{run.recipe.data.prepared}/test.jsonl: holds texts, not questions; ask with --text")
        messages, tools = for_template(row)
        asked.append((messages[:-1], tools))
    return asked


def _keep_held_out(
    file: Path, run: Run, options: argparse.Namespace, conversations: list[Asked], answers: dict[str, list[str]]
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
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    run_stage(
        options.run,
        lambda run: generate(as_held(run, options.held_by), options),
        explain_in_generate,
        checkpoint=options.checkpoint,
    )


if __name__ == "__main__":
    as_rank(main)
