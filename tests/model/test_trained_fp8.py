"""Trained weights in fp8: gradients against the same rounding in autograd, and what does not depend on ranks."""

import copy
import json
import math
import os
from pathlib import Path

import pytest
import quick_python
import torch
from fp8_reference import assert_equal_bits, rounding_in_autograd
from patience import PATIENCE_SECONDS
from ranks import run_ranks, sharded_model, train_here, whole
from reference_layers import HIDDEN, LAYERS, assert_close, assert_equal, packed, padded, run, written_out_copy
from reference_layers import plain as plain_model
from rounding import additions_to_a_step, distance, rounding

from fitune.model import trained_fp8
from fitune.model.layer import use_fp8_products
from fitune.training.evaluate import evaluate

STEP = 1 / 16
"Of a number at most: what rounding to e4m3's three bits takes away or adds."
PRODUCTS = 4  # in a row through one layer
STEPS = 12
TOKENS = torch.randint(0, 509, (2, 19), generator=torch.Generator().manual_seed(0))


def plain(dtype=torch.float64, **options):
    """Tests give it hidden states: its embedding gets no gradient."""
    model = plain_model(dtype, **options).train()
    model.model.embed_tokens.requires_grad_(False)
    return model


def _in_fp8(model, kept: int = LAYERS):
    model = written_out_copy(model, kept)
    use_fp8_products(model)
    return model


def _expected(model, batch) -> dict[str, torch.Tensor]:
    """By the names of the model's own parameters."""
    return {name.replace(".linear.", "."): value for name, value in run(rounding_in_autograd(model), batch).items()}


@pytest.mark.parametrize("batch", [packed, padded])
@pytest.mark.parametrize("options", [{}, {"attention_bias": True}, {"mlp_bias": True}, {"kind": "qwen3"}], ids=str)
def test_gradients_are_those_of_the_same_rounding_in_autograd(options, batch, exact):
    """Of every parameter, logits and the input."""
    (ours, theirs), model = batch(), plain(**options)
    expected = _expected(model, theirs)
    for kept in (0, 1, LAYERS):
        assert_close(run(_in_fp8(model, kept), ours), expected)


def test_tiles_of_the_mlp_add_up(exact, small_tiles):
    """Each with its own scales, so only near to what all tokens together give."""
    model, (batch, _) = plain(), packed()
    found, together = (run(_in_fp8(model, kept), batch) for kept in (LAYERS, 0)), _expected(model, packed()[1])
    for gradients in found:
        for name, value in together.items():
            assert distance(gradients[name], value) < 2 * STEP, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 16])
def test_one_inputs_products_are_as_near_as_rounding_allows(tokens, dtype):
    """Those of any number of tokens: the weights' gradient sums over them."""
    torch.manual_seed(0)
    weights = [torch.randn(rows, HIDDEN, dtype=dtype) for rows in (32, 16)]
    x, dy = torch.randn(tokens, HIDDEN, dtype=dtype), torch.randn(tokens, 48, dtype=dtype)
    y = torch.empty(tokens, 48, dtype=dtype)
    of_tokens, of_outputs = trained_fp8.multiply(x, weights, y)
    dx, dw = trained_fp8.input_gradient(dy, weights, of_outputs), trained_fp8.weight_gradient(dy, x, of_tokens)
    stacked = torch.cat(weights)
    for found, exact in ((y, x @ stacked.t()), (dx, dy @ stacked), (dw, dy.t() @ x)):
        assert found.dtype == dtype and found.is_contiguous()
        assert STEP / 10 < distance(found, exact) < 2 * STEP


def test_an_input_is_rounded_once_for_all_that_read_it(monkeypatch):
    """Forward rows of 4 inputs and 7 weights; backward the gradients of 4 outputs."""
    rounded, quantise = [], trained_fp8.quantise_rows
    monkeypatch.setattr(trained_fp8, "quantise_rows", lambda *x, **out: rounded.append(x) or quantise(*x, **out))
    run(_in_fp8(plain(torch.float32)), padded()[0])
    assert len(rounded) == (4 + 7 + 4) * LAYERS


def test_the_whole_model_is_as_near_as_its_products_allow():
    batch, _ = padded()
    model = plain(torch.float32)
    exact, found = run(copy.deepcopy(model), batch), run(_in_fp8(model), batch)
    in_a_row = 2 * PRODUCTS * LAYERS  # to a gradient: forward and back
    for name, value in exact.items():
        assert 0 < distance(found[name], value) < 2 * STEP * math.sqrt(in_a_row), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_and_recomputed_are_equal_to_the_last_bit(dtype):
    model, (batch, _) = plain(dtype), padded()
    expected = run(_in_fp8(model), batch)
    for kept in (0, 1):
        assert_equal(run(_in_fp8(model, kept), batch), expected)


def test_a_changed_weight_is_rounded_anew(exact):
    model, (batch, _) = plain(), padded()
    ours = _in_fp8(model)
    run(ours, batch)
    for changed in (ours, model):
        changed.zero_grad()
        with torch.no_grad():
            for layer in changed.model.layers:
                layer.mlp.up_proj.weight *= torch.linspace(0.1, 3, 128).unsqueeze(1)
    assert_close(run(ours, batch), _expected(model, batch))


def test_evaluation_does_not_round():
    model, (batch, _) = plain(torch.float32), padded()
    assert_equal(run(_in_fp8(model).eval(), batch), run(written_out_copy(model).eval(), batch))


def _in_fp8_layers(run_) -> list[tuple[bool, bool]]:
    model, _ = sharded_model(run_)
    return [(layer.trains_base, layer.fp8) for layer in model.model.layers]


def test_layers_compute_as_the_profile_says(tiny_base, make_run, tmp_path):
    for compute in ("bf16", "fp8"):
        run_ = make_run(tiny_base, tmp_path, "full", compute=compute)
        assert run_ranks(_in_fp8_layers, 1, run_) == [[(True, compute == "fp8")] * 2]


def _logits_and_gradients(runs: list) -> list[dict[str, torch.Tensor]]:
    found = []
    for run_ in runs:
        model, _ = sharded_model(run_)
        output = model.train()(TOKENS, labels=TOKENS, use_cache=False)
        output.loss.backward()
        found.append({"logits": output.logits.detach()} | {n: whole(p.grad) for n, p in model.named_parameters()})
    return found


@pytest.mark.parametrize("states", ["fp32", "bf16_8bit"])
def test_ranks_and_places_change_no_bit(states, tiny_base, make_run, tmp_path):
    """Weights freed after forward or not, in host RAM or not: backward finds them."""

    def models(ranks: int, compute: str = "fp8") -> list[dict]:
        options = {"processes": ranks, "compute": compute, "mixed_precision": "bf16", "optimizer_state": states}
        places = [{}, {"reshard_after_forward": False}, *([{"offload_params": True}] * (states == "fp32"))]
        runs = [make_run(tiny_base, tmp_path, "full", **options, **place) for place in places]
        return run_ranks(_logits_and_gradients, ranks, runs)[0]

    unrounded, *_ = models(1, "bf16")
    assert_equal_bits(models(1) + models(2), unrounded)


def _losses(run_, key: str = "loss") -> torch.Tensor:
    lines = (run_.folder / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([row[key] for line in lines if key in (row := json.loads(line))])


@pytest.mark.parametrize(
    "states", [{}, {"optimizer_state": "bf16_8bit", "optimizer_offload": True, "mixed_precision": "bf16"}], ids=str
)
def test_a_run_learns_as_one_in_full_precision(states, tiny_base, make_run, tmp_path):
    """The losses of the same steps, on one rank and on two. The last is lower by far more than they lie apart."""
    losses = {}
    for compute, ranks in (("bf16", 2), ("fp8", 2), ("fp8", 1)):
        training = {"max_steps": STEPS, "learning_rate": 5e-3}
        options = {"processes": ranks, "batch": 4, "compute": compute, "training": training} | states
        run_ = make_run(tiny_base, tmp_path / f"{compute}-{ranks}", "full", **options)
        run_ranks(train_here, ranks, run_)
        losses[compute, ranks] = _losses(run_)
        assert run_.result_folder.is_dir()
    apart = (losses["fp8", 2] - losses["bf16", 2]).abs().max()
    learned = losses["bf16", 2][0] - losses["bf16", 2][-3:].mean()
    assert 0 < apart < 0.1 * learned
    between = (losses["fp8", 2] - losses["fp8", 1]).abs()
    assert between[0] <= rounding(additions_to_a_step(run_)) * losses["fp8", 1][0]
    assert between.max() < STEP**2 * learned  # a sum's last bit may take a number to e4m3's next


def test_evaluations_while_training_are_those_of_eval(tiny_base, make_run, tmp_path):
    training = {"max_steps": 3, "learning_rate": 5e-3, "eval_strategy": "steps", "eval_steps": 3}
    options = {"batch": 4, "compute": "fp8", "training": training}
    run_ = make_run(tiny_base, tmp_path, "full", **options)
    run_ranks(train_here, 1, run_)
    run_ranks(evaluate, 1, run_)
    tuned = json.loads((run_.folder / "eval.json").read_text())["tuned"]["loss"]
    [while_training] = _losses(run_, "eval_loss")
    assert abs(tuned - while_training) <= rounding(additions_to_a_step(run_)) * tuned


def test_the_real_command_trains_on_the_cpu_and_says_that_fp8_is_emulated(tiny_base, prepared, tmp_path):
    sets = {"base.model": tiny_base, "data.prepared": prepared, "profile.compute": "fp8", "training.max_steps": 2}
    flags = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    command = ["cli.py", "train", "tiny_full", "--profile", "cpu_2proc", "--output", tmp_path / "run", *flags]
    root = Path(__file__).resolve().parents[2]
    done = quick_python.run(command, dict(os.environ), root, PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "profile.compute fp8 is emulated on the CPU" in done.stderr
    assert list((tmp_path / "run" / "model").glob("*.safetensors"))
