"""Evaluations while a run trains: the numbers of `eval` on any ranks; the best is chosen, kept and handed over."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, sharded_model, train_here
from rounding import additions_to_logits, rounding
from transformers import LlamaConfig

from fitune.data.prepared import load_rows
from fitune.launching.finished import read_finished
from fitune.model.sharding import local_part
from fitune.training.evaluate import evaluate
from fitune.training.trainer import ShardedSFTTrainer

LAYOUTS = [(micro_batch, packing) for micro_batch in (1, 2, 4) for packing in (False, True)]
EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 100}
WORSE_LATER = {"max_steps": 6, "learning_rate": 2, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 200}
"The loss on held-out rows falls, then the steps are too large."


def evaluations(runs: list) -> list[dict[str, float]]:
    """What training would log at a step, of each run, with an adapter that is not nothing."""
    found = []
    for run in runs:
        model, tokenizer = sharded_model(run)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    whole = torch.randn(parameter.shape, generator=generator)
                    local = local_part(parameter)
                    start = torch.distributed.get_rank() * -(-len(whole) // torch.distributed.get_world_size())
                    local.copy_(whole[start : start + len(local)])
        train, test = (load_rows(run.recipe, split, tokenizer, run.folder / "cache") for split in ("train", "test"))
        options = {"processing_class": tokenizer, "train_dataset": train, "eval_dataset": test}
        found.append(ShardedSFTTrainer(run, model=model, **options).evaluate())
    return found


def test_the_same_loss_for_any_ranks_micro_batch_and_packing(make_run, tiny_base, tmp_path):
    training = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    found = []
    for processes in (1, 2):
        runs = [
            make_run(
                tiny_base, tmp_path, "lora", processes=processes, micro_batch=rows, packing=packed, training=training
            )
            for rows, packed in LAYOUTS
        ]
        found += run_ranks(evaluations, processes, runs)[0]
    first = found[0]
    allowed = rounding(additions_to_logits(LlamaConfig.from_pretrained(tiny_base), 256))
    for metrics in found:
        assert metrics["eval_tokens"] == first["eval_tokens"]
        assert abs(metrics["eval_loss"] - first["eval_loss"]) < allowed * first["eval_loss"]
        assert abs(metrics["eval_perplexity"] - first["eval_perplexity"]) < allowed * first["eval_loss"] * 1000


def _logged(run, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def _evaluated(run) -> dict[str, float]:
    run_ranks(evaluate, run.accelerate.num_processes, run)
    return json.loads((run.folder / "eval.json").read_text())["tuned"]


def _weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize(("method", "processes", "rate"), [("full", 2, 10), ("lora", 1, 2), ("qlora", 2, 2)])
def test_the_best_evaluation_becomes_the_result(method, processes, rate, make_run, tiny_base, tmp_path):
    training = {**EACH_STEP, **WORSE_LATER, "learning_rate": rate, "load_best_model_at_end": True}
    training |= {"save_steps": 1, "save_total_limit": 2}
    run = make_run(tiny_base, tmp_path / "run", method, processes=processes, batch=2, training=training)
    run_ranks(train_here, processes, run)
    losses = _logged(run, "eval_loss")
    best = min(losses, key=losses.get)
    assert 1 < best < run.recipe.training["max_steps"], "else the last, or the first, could be taken for the best"
    assert read_finished(run.folder)["result_step"] == best
    said = f"Result: step {best}, the best evaluation; training went on to step {run.recipe.training['max_steps']}."
    assert said in (run.result_folder / "README.md").read_text()
    checkpoint = run.folder / "checkpoints" / f"checkpoint-{best}"
    assert (checkpoint / "manifest.json").is_file(), "kept though it is not among the newest two"
    if method != "full":
        assert _weights(run.result_folder) == _weights(checkpoint / run.result_folder.name)
    allowed = rounding(additions_to_logits(LlamaConfig.from_pretrained(tiny_base), run.recipe.max_length))
    assert abs(_evaluated(run)["loss"] - losses[best]) < allowed * losses[best]

    before = _weights(run.result_folder)
    shutil.rmtree(run.result_folder)  # killed while it saved the result
    run_ranks(train_here, processes, run.model_copy(update={"resume": True}))
    assert _weights(run.result_folder) == before

    (checkpoint / "trainer_state.json").write_text("{}")  # damaged: the next best is taken
    shutil.rmtree(run.result_folder)
    run_ranks(train_here, processes, run.model_copy(update={"resume": True}))
    others = {int(path.name.split("-")[1]) for path in checkpoint.parent.glob("checkpoint-*")} - {best}
    second = min(others & losses.keys(), key=losses.get)
    assert abs(_evaluated(run)["loss"] - losses[second]) < allowed * losses[second]


@pytest.mark.parametrize(("processes", "replicas"), [(1, 1), (2, 1), (2, 2)])
def test_training_ends_where_it_gets_no_better(processes, replicas, make_run, tiny_base, tmp_path):
    training = {**EACH_STEP, **WORSE_LATER, "max_steps": 40, "load_best_model_at_end": True}
    options = {"processes": processes, "replicas": replicas, "batch": 2, "training": training}
    options |= {"early_stopping": {"patience": 1}}
    run = make_run(tiny_base, tmp_path / "run", "qlora", **options)
    run_ranks(train_here, processes, run)
    losses = list(_logged(run, "eval_loss").values())
    assert losses == sorted(losses[:-1], reverse=True) + losses[-1:], "each better than the last, but for the end"
    assert losses[-1] > losses[-2] and 2 < len(losses) < 40

    logged = (run.folder / "metrics.jsonl").read_text()
    before = _weights(run.result_folder)
    shutil.rmtree(run.result_folder)
    run_ranks(train_here, processes, run.model_copy(update={"resume": True}))
    assert (run.folder / "metrics.jsonl").read_text() == logged, "what has stopped early trains no more"
    assert _weights(run.result_folder) == before

    for path in (run.folder / "checkpoints").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) >= len(losses) - 1:
            shutil.rmtree(path)  # as if killed before: it stops where it did
    run_ranks(train_here, processes, run.model_copy(update={"resume": True}))
    assert list(_logged(run, "eval_loss").values()) == losses
    assert _weights(run.result_folder) == before


def test_only_the_best_are_saved(make_run, tiny_base, tmp_path):
    training = {**EACH_STEP, **WORSE_LATER, "save_strategy": "best", "metric_for_best_model": "token_accuracy"}
    run = make_run(tiny_base, tmp_path, "lora", batch=2, training=training)
    run_ranks(train_here, 1, run)
    best, saved = 0.0, []
    for step, accuracy in _logged(run, "eval_token_accuracy").items():
        if accuracy > best:
            best = accuracy
            saved.append(step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"checkpoint-{n}" for n in saved]
    assert 0 < len(saved) < training["max_steps"]
