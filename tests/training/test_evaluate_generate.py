"""`eval` and `generate` of a run, on one and two ranks, against plain transformers + PEFT on the same adapter."""

import importlib
import json
import weakref
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from ranks import run_alone, run_ranks, sharded_model, train_here
from rounding import additions_to_logits, rounding

from fitune.data.chat_template import end_of_turn_ids, template_hash
from fitune.data.dataset import load_tokenizer
from fitune.export.chat_record import ChatRecord, read_chat_record
from fitune.model.sharding import local_part
from fitune.training.answerer import Answerer
from fitune.training.evaluate import evaluate
from fitune.training.generate import generate
from fitune.training.result import save_result
from fitune.weights.base_identity import identify_base

MAX_LENGTH = 256
PROMPTS = ["River stone letter.", "Winter garden"]


def write_adapter(run) -> None:
    """An adapter with B far from zero, so that base and tuned model differ."""
    model, tokenizer = sharded_model(run)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                local_part(parameter).copy_(torch.randn(parameter.shape, generator=generator))
    run.folder.mkdir(parents=True, exist_ok=True)
    record = identify_base(run.recipe.base, Path(run.recipe.base.model))
    save_result(run.result_folder, run, model, tokenizer, record)


def ask(run) -> None:
    file = run.folder / f"answers-{run.accelerate.num_processes}.json"
    generate(
        run,
        Namespace(
            prompt=PROMPTS,
            text=[],
            test=1,
            chat=False,
            max_new_tokens=12,
            temperature=0.0,
            seed=None,
            json=file,
            force=False,
        ),
    )


@pytest.fixture(scope="module", params=[False, True], ids=["rows", "packed"])
def runs(request, make_run, tiny_base, tmp_path_factory):
    """The same lora run resolved for one and for two processes, its adapter written; dropout is for training alone."""
    folder = tmp_path_factory.mktemp("run")
    options = {"batch": 2, "micro_batch": 1, "packing": request.param, "lora": {"dropout": 0.3}}
    by_processes = {n: make_run(tiny_base, folder, "lora", processes=n, **options) for n in (1, 2, 3)}
    run_ranks(write_adapter, 1, by_processes[1])
    return by_processes


def reference(run):
    """(tokenizer, base, tuned) by plain transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = Path(run.recipe.base.model)
    base, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    return load_tokenizer(run.recipe, folder), base, PeftModel.from_pretrained(other, run.result_folder).eval()


@torch.no_grad()
def plain_metrics(model, tokenizer, run) -> dict[str, float]:
    rows = (Path(run.recipe.data.prepared) / "test.jsonl").read_text().splitlines()
    loss = right = tied = tokens = 0
    for row in map(json.loads, rows):
        encoded = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        logits = model(input_ids=encoded["input_ids"]).logits[0, :-1]
        targets, mask = encoded["input_ids"][0, 1:], encoded["assistant_masks"][0, 1:].bool()
        loss += torch.nn.functional.cross_entropy(logits[mask], targets[mask], reduction="sum").item()
        right += (logits.argmax(-1) == targets)[mask].sum().item()
        tied += (margins(logits[mask]) < rounding_of_logits(model)).sum().item()
        tokens += int(mask.sum())
    return {"loss": loss / tokens, "token_accuracy": right / tokens, "tokens": tokens, "tied": tied / tokens}


def margins(logits: torch.Tensor) -> torch.Tensor:
    """By how much the best token of each position is better than the second, relative to its logits' size."""
    best, second = logits.topk(2).values.unbind(-1)
    return (best - second) / logits.square().mean(-1).sqrt()


def rounding_of_logits(model) -> float:
    return rounding(additions_to_logits(model.config, MAX_LENGTH))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_counts_every_answer_token_once(runs, processes):
    """Also where the ranks don't divide the rows."""
    run = runs[processes]
    run_ranks(evaluate, processes, run)
    report = json.loads((run.folder / "eval.json").read_text())
    tokenizer, base, tuned = reference(run)
    assert report["rows"] == 8
    for label, model in (("base", base), ("tuned", tuned)):
        expected = plain_metrics(model, tokenizer, run)
        assert report[label]["tokens"] == expected["tokens"]
        assert report[label]["loss"] == pytest.approx(expected["loss"], rel=rounding_of_logits(model))
        assert report[label]["token_accuracy"] == pytest.approx(expected["token_accuracy"], abs=expected["tied"] + 1e-9)
    assert abs(report["base"]["loss"] - report["tuned"]["loss"]) > 0.01


def _plain_answer(model, tokenizer, messages: list[dict]) -> str:
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    stop = end_of_turn_ids(tokenizer)
    output = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, eos_token_id=stop, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert margins(torch.cat(output.logits)).min() > rounding_of_logits(model), "a tie: choose other prompts"
    ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("processes", [1, 2])
def test_answers_equal_plain_generation(runs, processes):
    run = runs[processes]
    run_ranks(ask, processes, run)
    answers = json.loads((run.folder / f"answers-{processes}.json").read_text())
    assert len(answers) == len(PROMPTS) + 1, "the prompts, and one held-out conversation"
    held_out = json.loads((Path(run.recipe.data.prepared) / "test.jsonl").read_text().splitlines()[0])["messages"]
    assert answers[-1]["messages"] == held_out[:-1], "up to its last answer"
    tokenizer, base, tuned = reference(run)
    assert read_chat_record(run.result_folder) == ChatRecord(template_hash(tokenizer), None)
    for entry in answers:
        for label, model in (("base", base), ("tuned", tuned)):
            assert entry[label] == _plain_answer(model, tokenizer, entry["messages"])
    assert any(entry["base"] != entry["tuned"] for entry in answers)
    for_page = json.loads((run.folder / "answers.json").read_text())
    assert for_page["rows"] == [answers[-1] | {"expected": held_out[-1]["content"]}], "what the run's page shows"


def test_answers_about_rows_that_were_prepared_since_are_not_the_pages(runs):
    run = runs[1]
    file, started_with = run.folder / "answers.json", run.folder / "data.json"
    file.write_text("kept")
    started_with.write_text(json.dumps({"rows": {"test": "of other rows"}}))
    try:
        run_ranks(ask, 1, run)
    finally:
        started_with.unlink()
    assert file.read_text() == "kept"


def sampled(run) -> list[str]:
    """The answers that this rank computes, drawn at a temperature."""
    answers, answer_all = [], Answerer.answers

    def recorded(self, conversations):
        found = answer_all(self, conversations)
        answers.extend(found)
        return found

    Answerer.answers = recorded
    options = {
        "prompt": PROMPTS,
        "text": [],
        "test": 0,
        "chat": False,
        "max_new_tokens": 12,
        "json": None,
        "force": False,
    }
    generate(run, Namespace(**options, temperature=1.5, seed=None))
    return answers


def test_all_ranks_draw_the_same_answer(runs):
    """Else one would stop while another waits for it to gather the next layer."""
    one, two = run_ranks(sampled, 2, runs[2])
    assert one == two
    assert len(one) == 2 * len(PROMPTS) and len(set(one)) > 1


def test_a_full_run_is_evaluated_against_its_base(make_run, tiny_base, tmp_path):
    training = {"max_steps": 2, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 1}
    run = make_run(tiny_base, tmp_path, "full", processes=2, batch=2, training=training)
    run_ranks(train_here, 2, run)
    run_ranks(evaluate, 2, run)
    report = json.loads((run.folder / "eval.json").read_text())
    assert report["tuned"]["loss"] < report["base"]["loss"] - 0.05


@pytest.mark.parametrize("changed", [{"r": 2}, {"alpha": 4.0}, {"target_modules": ["q_proj"]}], ids=str)
def test_an_adapter_that_is_not_as_run_yaml_says_is_refused(changed, make_run, tiny_base, tmp_path):
    """Its scale would be another one, without a word."""
    run = make_run(tiny_base, tmp_path, "lora", training={"max_steps": 1})
    run_alone(train_here, run)
    lora = run.recipe.lora.model_copy(update=changed)
    other = run.model_copy(update={"recipe": run.recipe.model_copy(update={"lora": lora})})
    with pytest.raises(RuntimeError, match=r"UsageError: .*adapter: has .*run\.yaml asks for .*: put its lora block"):
        run_alone(evaluate, other)


def test_a_checkpoint_stands_for_the_runs_result(make_run, tiny_base, tmp_path):
    training = {"max_steps": 2, "learning_rate": 1e-1, "lr_scheduler_type": "constant", "save_strategy": "steps"}
    run = make_run(tiny_base, tmp_path, "lora", training=training | {"save_steps": 1})
    run_ranks(train_here, 1, run)
    run_ranks(evaluate, 1, run)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-1"
    earlier = run.model_copy(update={"checkpoint": str(checkpoint)})
    run_ranks(evaluate, 1, earlier)
    run_ranks(ask, 1, earlier)
    result, saved = (json.loads((tmp_path / name).read_text()) for name in ("eval.json", "eval-checkpoint-1.json"))
    tokenizer, _, tuned = reference(earlier)
    assert saved["base"] == result["base"]
    assert saved["tuned"]["loss"] == pytest.approx(plain_metrics(tuned, tokenizer, run)["loss"], rel=1e-5)
    assert abs(saved["tuned"]["loss"] - result["tuned"]["loss"]) > 0.01
    answers = json.loads((tmp_path / "answers-1.json").read_text())
    assert [entry["tuned"] for entry in answers] == [
        _plain_answer(tuned, tokenizer, entry["messages"]) for entry in answers
    ]


def test_a_full_runs_checkpoint_stands_for_its_result_on_any_number_of_ranks(make_run, tiny_base, tmp_path):
    """The last one is the result, as this base is stored in float32, in which weights are trained."""
    training = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    runs = {n: make_run(tiny_base, tmp_path, "full", processes=n, batch=2, training=training) for n in (1, 2)}
    run_ranks(train_here, 2, runs[2])
    found = {}
    for checkpoint in (None, "checkpoint-1", "checkpoint-2"):
        given = {"checkpoint": checkpoint and str(tmp_path / "checkpoints" / checkpoint)}
        run_ranks(evaluate, 2, runs[2].model_copy(update=given))
        run_ranks(ask, 1, runs[1].model_copy(update=given))
        losses = json.loads((tmp_path / f"eval{f'-{checkpoint}' * bool(checkpoint)}.json").read_text())
        found[checkpoint] = losses, json.loads((tmp_path / "answers-1.json").read_text())
    assert found["checkpoint-2"] == found[None]
    assert found["checkpoint-1"][0]["base"] == found[None][0]["base"]
    assert found["checkpoint-1"][0]["tuned"]["loss"] > found[None][0]["tuned"]["loss"] + 0.01


def alive_where_the_next_is_loaded(run, stage: str) -> list[int]:
    """How many parameters of models that were loaded before are still there, at each load."""
    module, parts, alive = importlib.import_module(f"fitune.training.{stage}"), [], []
    load = module.load_sharded_model

    def counted(*arguments, **options):
        alive.append(sum(part() is not None for part in parts))
        model = load(*arguments, **options)
        parts.extend(weakref.ref(part) for part in (model, *model.parameters()))
        return model

    module.load_sharded_model = counted
    {"evaluate": evaluate, "generate": ask}[stage](run)
    return alive


@pytest.mark.parametrize("stage", ["evaluate", "generate"])
@pytest.mark.parametrize("processes", [1, 2])
def test_base_and_tuned_of_method_full_are_held_one_after_the_other(make_run, tiny_base, tmp_path, stage, processes):
    """As `plan` counts one of them."""
    run = make_run(tiny_base, tmp_path / "run", "full", processes=processes, batch=2, micro_batch=1)
    run_ranks(write_adapter, processes, run)
    assert run_ranks(alive_where_the_next_is_loaded, processes, run, stage) == [[0, 0]] * processes
