"""Gathered weights that stay until the backward pass: the same training to the bit, and nothing left behind."""

import json

import pytest
import torch
from ranks import run_ranks, train_here
from safetensors.torch import load_file
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group

from fitune.model.sharding import decoder, parameter_groups
from fitune.training import evaluate as evaluate_module
from fitune.training.evaluate import evaluate
from fitune.training.trainer import ShardedSFTTrainer

STEPS = 4
TRAINING = {
    "max_steps": STEPS, "learning_rate": 5e-3, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
    "save_steps": 2, "max_grad_norm": 0.5,
}  # fmt: skip
OPTIONS = {"batch": 8, "packing": True, "max_length": 112, "training": TRAINING}
"Two passes a step for four ranks, four for two."
TWO_BY_TWO = {"processes": 4, "machines": 2, "replicas": 2}
CASES = {
    "full": ("full", {"processes": 2}),
    "full, small states in RAM": ("full", {"processes": 2, "optimizer_state": "bf16_8bit", "optimizer_offload": True}),
    "full, hybrid": ("full", TWO_BY_TWO),
    "lora, trained tokens": ("lora", {"processes": 2, "lora": {"dropout": 0.2, "trainable_tokens": ["<|eot_id|>"]}}),
    "qlora, hybrid": ("qlora", TWO_BY_TWO),
    "lora in fp8, embedding in RAM": ("lora", {"processes": 2, "compute": "fp8", "embedding_offload": True}),
}


def _gathered(model) -> int:
    """Layers whose weights are whole."""
    layers = {id(layer) for layer in decoder(model).model.layers}
    return sum(group.is_unsharded and id(group.modules[0]) in layers for group in parameter_groups(model))


def _train_watched(run) -> dict[str, list[int]]:
    """Trains; layers that are whole when the loss is there, after evaluations and when checkpoint and result are saved,
    and how many layers were gathered in each pass of training."""
    seen = {"loss": [], "evaluated": [], "checkpoint": [], "result": [], "gathers": []}
    count = [0]

    def watch(when: str, name: str, *, after: bool = False) -> None:
        original = getattr(ShardedSFTTrainer, name)

        def watched(trainer, *args, **kwargs):
            before = _gathered(trainer.model)
            result = original(trainer, *args, **kwargs)
            seen[when].append(_gathered(trainer.model) if after else before)
            return result

        setattr(ShardedSFTTrainer, name, watched)

    watch("loss", "compute_loss", after=True)
    watch("evaluated", "evaluate", after=True)
    watch("checkpoint", "_save_checkpoint")
    watch("result", "save_model")
    step, gather = ShardedSFTTrainer.training_step, param_group.foreach_all_gather

    def counted(parameters, *args, **kwargs):
        count[0] += "layers" in (parameters[0]._param_fqn or "")
        return gather(parameters, *args, **kwargs)

    def training_step(trainer, *args, **kwargs):
        count[0] = 0
        result = step(trainer, *args, **kwargs)
        seen["gathers"].append(count[0])
        return result

    param_group.foreach_all_gather, ShardedSFTTrainer.training_step = counted, training_step
    train_here(run)
    return seen


def _numbers(run) -> list[dict]:
    """What was logged of losses, norms and evaluations."""
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    kept = ("loss", "grad_norm", "eval_loss", "eval_token_accuracy")
    return [{key: line[key] for key in kept if key in line} for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_the_same_training_to_the_bit_and_nothing_stays_whole(case, uneven_base, make_run, tmp_path):
    method, extra = CASES[case]
    runs = {
        name: make_run(uneven_base, tmp_path / name, method, reshard_after_forward=name == "freed", **OPTIONS, **extra)
        for name in ("freed", "kept")
    }
    ranks = runs["kept"].accelerate.num_processes
    seen = {name: run_ranks(_train_watched, ranks, run) for name, run in runs.items()}
    passes = runs["kept"].gradient_accumulation_steps
    later = 0 if method == "full" else 2  # these stay to the end of the step
    assert passes > 1
    for of_freed, of_kept in zip(*seen.values(), strict=True):
        assert set(of_kept["loss"]) == {2} and set(of_freed["loss"]) == {0}
        assert of_kept["gathers"] == ([2] + [later] * (passes - 1)) * STEPS and set(of_freed["gathers"]) == {4}
        assert of_kept["evaluated"] == [0, 0] and of_kept["checkpoint"] == [0, 0] and of_kept["result"] == [0]

    freed, kept = runs.values()
    numbers = _numbers(kept)
    assert numbers == _numbers(freed) and sum("eval_loss" in line for line in numbers) == 2
    [file] = kept.result_folder.glob("*model*.safetensors")
    expected = load_file(freed.result_folder / file.name)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(file).items())
    for step in (2, 4):
        for part in sorted((kept.folder / f"checkpoints/checkpoint-{step}/state").rglob("*.safetensors")):
            expected = load_file(freed.folder / part.relative_to(kept.folder))
            for name, tensor in load_file(part).items():
                assert torch.equal(tensor, expected[name]), (part, name)


def _evaluate_watched(run) -> list[int]:
    """Layers that stay whole in the model that `eval` asks, after each of its passes."""
    found, metrics = [], evaluate_module.token_metrics

    def watched(model, *args, **kwargs):
        result = metrics(model, *args, **kwargs)
        found.append(_gathered(model))
        return result

    evaluate_module.token_metrics = watched
    evaluate(run)
    return found


def test_a_model_that_is_asked_frees_its_layers(uneven_base, make_run, tmp_path):
    run = make_run(uneven_base, tmp_path, "qlora", processes=2, reshard_after_forward=False, **OPTIONS)
    run_ranks(train_here, 2, run)
    for found in run_ranks(_evaluate_watched, 2, run):
        assert found and set(found) == {0}
