"""Every kind of base: loss and gradients on one rank and on two are those of plain transformers."""

import json

import pytest
import torch
from bases import base_like, make_adapter, plain_model, with_adapter
from peft import PeftModel
from ranks import run_ranks, sharded_model, train_here, whole
from rounding import additions_to_gradients, additions_to_logits, assert_equal_but_for_rounding
from transformers import AutoConfig

from fitune.config.stored_weights import EMBEDDING, HEAD
from fitune.export.merge import merge_adapter, merge_run
from fitune.model.sharding import local_part, local_rows
from fitune.weights.quantize import quantize
from fitune.weights.safetensors_files import Checkpoint

LENGTH = 40
ROPE = {"rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BASES = {
    "tied": {"tie_word_embeddings": True},
    "tied, more rows than tokens": {"tie_word_embeddings": True, "vocab_size": 523},
    "head_dim": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True, "dtype": torch.float16},
    "every head its keys": {"num_key_value_heads": 4, "dtype": torch.float32},
    "rope llama3": {"rope_parameters": ROPE | LLAMA3 | {"original_max_position_embeddings": 16}},
    "rope linear": {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}},
    "rope dynamic": {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0}},
    "rope yarn": {
        "rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    },
}
BASES |= {
    "mistral": {"model_type": "mistral", "sliding_window": 256},
    "mistral, heads of another size": {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3, biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
}
RANDOM_B = 0.05


def _losses_and_gradients(runs: dict, tokens) -> dict:
    """Case -> (loss, adapter's values, gradients), by PEFT's names without its adapter's."""
    report = {}
    for case, run in runs.items():
        model, _ = sharded_model(run)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if run.recipe.method != "full":  # else B is zero, and hides A
            for name, parameter in trained.items():
                if "lora_B" in name:
                    generator = torch.Generator().manual_seed(len(name))
                    values = RANDOM_B * torch.randn(parameter.shape, generator=generator)
                    _fill(parameter, values)
        values = {name: whole(p).detach().clone() for name, p in trained.items() if "lora_" in name}
        loss = model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        gradients = {name: whole(parameter.grad).clone() for name, parameter in trained.items()}
        report[case] = loss.detach(), values, gradients
    return report


def _fill(parameter, values: torch.Tensor) -> None:
    start, stop = local_rows(len(values), torch.distributed.get_rank(), torch.distributed.get_world_size())
    local_part(parameter.data).copy_(values[start:stop])


def _expected(run, values: dict, tokens):
    model = plain_model(run.recipe.base.model, run.recipe.method)
    if run.recipe.method != "full":
        model = with_adapter(model, run.recipe.lora.r, run.recipe.lora.alpha)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(values[name])
    loss = model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("method", "ranks"), [("full", 1), ("full", 2), ("lora", 2), ("qlora", 1), ("qlora", 2)])
def test_loss_and_gradients_are_those_of_transformers(method, ranks, uneven_base, make_run, tmp_path):
    runs = {
        case: make_run(base_like(uneven_base, tmp_path / case, **changes), tmp_path, method, processes=ranks)
        for case, changes in BASES.items()
    }
    tokens = torch.randint(0, 509, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    reports = run_ranks(_losses_and_gradients, ranks, runs, tokens)
    for case, run in runs.items():
        adapter = reports[0][case][1]
        expected_loss, expected = _expected(run, adapter, tokens)
        config = AutoConfig.from_pretrained(run.recipe.base.model)
        additions = additions_to_gradients(config, LENGTH, tokens.numel())
        for loss, values, gradients in (report[case] for report in reports):
            assert all(torch.equal(values[name], value) for name, value in adapter.items())
            assert_equal_but_for_rounding(loss, expected_loss, additions, of=f"{case}: loss")
            assert set(gradients) == set(expected), case
            for name, gradient in gradients.items():
                assert_equal_but_for_rounding(gradient, expected[name], additions, of=f"{case}: {name}")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_merged_they_answer_as_base_and_adapter_do(method, uneven_base, make_run, tmp_path):
    """In float32, so that only the order of additions differs; bases in 4 bits are taken as training computed."""
    for case, changes in BASES.items():
        base = base_like(uneven_base, tmp_path / case, **changes)
        adapter = make_adapter(base, tmp_path / f"{case}-adapter")
        onto = "trained" if method == "qlora" else "original"
        merged = merge_adapter(
            base, adapter, tmp_path / f"{case}-merged", onto=onto, dtype=torch.float32, progress=False
        )
        tokens = torch.randint(0, 509, (1, LENGTH), generator=torch.Generator().manual_seed(0))
        config = AutoConfig.from_pretrained(base)
        additions = (
            additions_to_logits(config, LENGTH) + 5 * 7 * config.num_hidden_layers
        )  # rank 4, and what it adds to
        with torch.no_grad():
            expected = (
                PeftModel.from_pretrained(plain_model(base, method, unpacked=None), adapter).eval()(tokens).logits
            )
            found = plain_model(merged)(tokens).logits
        assert_equal_but_for_rounding(found, expected, additions, of=case)
        assert AutoConfig.from_pretrained(merged).tie_word_embeddings == config.tie_word_embeddings


def test_quantised_beforehand_they_are_the_same_to_the_last_bit(uneven_base, make_run, tmp_path):
    runs = {}
    for case in ("biases", "qwen2, tied", "qwen3, biases"):
        base = base_like(uneven_base, tmp_path / case, **BASES[case])
        for kind in (base, quantize(base, tmp_path / f"{case}-nf4", torch.device("cpu"))):
            runs[case, kind == base] = make_run(kind, tmp_path, "qlora", processes=2)
    tokens = torch.randint(0, 509, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    for report in run_ranks(_losses_and_gradients, 2, runs, tokens):
        for (case, from_bf16), (loss, _, gradients) in report.items():
            expected_loss, _, expected = report[case, True]
            assert torch.equal(loss, expected_loss), (case, from_bf16)
            assert all(torch.equal(gradients[name], expected[name]) for name in expected), (case, from_bf16)


def test_a_tied_model_trained_fully_leaves_one_tensor(tied_base, make_run, tmp_path):
    """Its result and what is merged of it have no head beside the embedding, and transformers loads them so."""
    run = make_run(tied_base, tmp_path / "run", "full", processes=2, training={"max_steps": 2, "learning_rate": 1e-2})
    run_ranks(train_here, 2, run)
    merged = merge_run(run, tmp_path / "merged")
    with Checkpoint(merged) as weights, Checkpoint(tied_base) as before:
        assert set(weights.tensors) == set(before.tensors) and HEAD not in weights
        assert not torch.equal(weights.read(EMBEDDING), before.read(EMBEDDING))
    model = plain_model(merged)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"]
