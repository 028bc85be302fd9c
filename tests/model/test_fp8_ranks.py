"""fp8 in sharded models and whole runs: nothing depends on ranks or on where the weights lie."""

import json

import pytest
import torch
from fp8_reference import assert_equal_bits
from ranks import run_ranks, sharded_model, train_here, whole

from fitune.model.fp8_linear import FP8Linear
from fitune.model.layer import use_fp8_products
from fitune.model.skeleton import decoder
from fitune.training.evaluate import evaluate

TOKENS = torch.randint(0, 509, (2, 19), generator=torch.Generator().manual_seed(0))
STEPS = 12


def _logits_and_gradients(runs: list, on_the_way: bool = False) -> list[dict[str, torch.Tensor]]:
    """Of each run's model, adapter B not zero; `on_the_way` rounds weights that are loaded as they are."""
    found = []
    for run in runs:
        model, _ = sharded_model(run)
        assert any(isinstance(module, FP8Linear) for module in model.modules()) == run.keeps_base_in_fp8
        if on_the_way:
            use_fp8_products(decoder(model))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.01)
        output = model(TOKENS, labels=TOKENS, use_cache=False)
        output.loss.backward()
        gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}
        found.append({"logits": output.logits.detach()} | gradients)
    return found


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_ranks_and_offload_change_no_bit(method, tiny_base, make_run, tmp_path):
    def models(world_size: int, compute: str = "fp8") -> list[dict]:
        options = {"processes": world_size, "compute": compute}
        runs = [make_run(tiny_base, tmp_path, method, **options, offload_params=on) for on in (False, True)]
        return run_ranks(_logits_and_gradients, world_size, runs)[0]

    [unrounded, _] = models(1, "bf16")
    assert_equal_bits(models(1) + models(2), unrounded)


@pytest.mark.parametrize(
    ("mixed_precision", "stored"), [("no", "tiny_base"), ("bf16", "tiny_base"), ("bf16", "uneven_base")]
)
def test_kept_weights_train_as_if_rounded_on_the_way(mixed_precision, stored, make_run, tmp_path, request):
    """Wherever they lie, of a base in float32 and one in bf16; all linears have adapters, or some.

    Float32 holds all numbers of the second: to compute it there would round the same ones.
    """
    base = request.getfixturevalue(stored)
    some = {"lora": {"target_modules": ["k_proj", "up_proj"]}}
    in_ram = [{"offload_params": True}, {"embedding_offload": True}, some | {"offload_params": True}]
    hybrid = [{"machines": 2, "replicas": 2}]
    for world_size, places in ((1, [{}, some, *in_ram]), (2, [{}, some, *in_ram]), (4, hybrid)):
        models = {}
        for compute in ("fp8", "bf16"):
            options = {"processes": world_size, "mixed_precision": mixed_precision, "compute": compute}
            runs = [make_run(base, tmp_path, "lora", **options, **place) for place in places]
            models[compute] = run_ranks(_logits_and_gradients, world_size, runs, compute == "bf16")[0]
        for found, expected in zip(*models.values(), strict=True):
            assert set(found) == set(expected)
            for name, value in expected.items():
                assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("method", "offload"), [("qlora", False), ("lora", True)])
def test_a_run_learns_as_one_in_full_precision(method, offload, tiny_base, make_run, tmp_path):
    """The losses of the same steps. The last one is lower by far more than the two lie apart."""
    losses = {}
    options = {"processes": 2, "batch": 4, "offload_params": offload}
    for compute in ("bf16", "fp8"):
        training = {"max_steps": STEPS, "learning_rate": 5e-3}
        run = make_run(tiny_base, tmp_path / compute, method, **options, compute=compute, training=training)
        run_ranks(train_here, 2, run)
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        losses[compute] = torch.tensor([row["loss"] for line in lines if "loss" in (row := json.loads(line))])
        assert run.result_folder.is_dir()
    apart = (losses["fp8"] - losses["bf16"]).abs().max()
    learned = losses["bf16"][0] - losses["bf16"][-3:].mean()
    assert 0 < apart < 0.1 * learned


def test_eval_takes_the_stored_base_where_evaluations_while_training_have_the_rounded_one(
    tiny_base, make_run, tmp_path
):
    training = {"max_steps": 3, "learning_rate": 5e-3, "eval_strategy": "steps", "eval_steps": 3}
    of_base, apart = {}, {}
    for compute in ("bf16", "fp8"):
        run = make_run(tiny_base, tmp_path / compute, "lora", batch=4, compute=compute, training=training)
        run_ranks(train_here, 1, run)
        run_ranks(evaluate, 1, run)
        report = json.loads((run.folder / "eval.json").read_text())
        lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
        [while_training] = [line["eval_loss"] for line in lines if "eval_loss" in line]
        of_base[compute], apart[compute] = report["base"], abs(report["tuned"]["loss"] - while_training)
    assert of_base["fp8"] == of_base["bf16"]
    assert 100 * apart["bf16"] < apart["fp8"] < 0.01 * of_base["bf16"]["loss"]
