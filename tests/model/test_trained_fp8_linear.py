"""Trained weights in fp8: gradients against the same rounding in autograd, and what does not depend on ranks."""

import copy
import json
import math
import os
from pathlib import Path

import pytest
import quick_python
import torch
from fp8_reference import assert_equal_bits, scaled
from patience import PATIENCE_SECONDS
from ranks import run_ranks, sharded_model, train_here, whole
from reference_layers import HIDDEN, LAYERS, assert_close, assert_equal, padded, run
from reference_layers import plain as plain_model
from rounding import additions_to_a_step, distance, rounding

from fitune.errors import UsageError
from fitune.model import trained_fp8_linear
from fitune.model.activations import keep_activations
from fitune.model.trained_fp8_linear import TrainedFP8Linear
from fitune.training.evaluate import evaluate

STEP = 1 / 16
"Of a number at most: what rounding to e4m3's three bits takes away or adds."
PRODUCTS = 4  # in a row through one layer
STEPS = 12
TOKENS = torch.randint(0, 509, (2, 19), generator=torch.Generator().manual_seed(0))


def plain(dtype=torch.float64, **options):
    """Tests give it hidden states: its embedding gets no gradient."""
    model = plain_model(dtype, **options)
    model.model.embed_tokens.requires_grad_(False)
    return model


class _Rounded(torch.autograd.Function):
    """x W^T of rounded rows; backward multiplies by the rounded W and by the rounded x."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        (values, scales), (v, s) = scaled(x.flatten(0, -2)), scaled(weight)
        return ((values * scales) @ (v * s).t()).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        (inputs, a), (v, s), dy = scaled(x.flatten(0, -2)), scaled(weight), dy.flatten(0, -2).float()
        (values, scales), (turned, of_columns) = scaled(dy * s.t().float()), scaled((dy * a.float()).t())
        return ((values * scales) @ v).view_as(x), (turned * of_columns) @ inputs


class _Reference(torch.nn.Linear):
    def forward(self, x):
        y = _Rounded.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


def _with_linears(model, kind: type[torch.nn.Linear]):
    """A copy whose decoder layers have `kind` in place of the usual linears."""
    model = copy.deepcopy(model).train()
    for linear in model.model.layers.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.__class__ = kind
    return model


def _in_fp8(model, kept: int = LAYERS):
    model = _with_linears(model, TrainedFP8Linear)
    keep_activations(model, kept, offload=False)
    return model


def _reference(model):
    return _with_linears(model, _Reference)


@pytest.mark.parametrize("kept", [0, 1, LAYERS])
@pytest.mark.parametrize("options", [{}, {"attention_bias": True}, {"mlp_bias": True}], ids=str)
def test_gradients_are_those_of_the_same_rounding_in_autograd(options, kept, exact):
    """Of every parameter, logits and the input."""
    batch, _ = padded()
    model = plain(**options)
    assert_close(run(_in_fp8(model, kept), batch), run(_reference(model), batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 16])
def test_one_linears_products_are_as_near_as_rounding_allows(tokens, dtype):
    """Those of any number of tokens: the weight's gradient sums over them. The bias's own is not rounded."""
    torch.manual_seed(0)
    usual = torch.nn.Linear(HIDDEN, 32, dtype=dtype)
    ours = copy.deepcopy(usual)
    ours.__class__ = TrainedFP8Linear
    x, dy = torch.randn(2, tokens, HIDDEN, dtype=dtype), torch.randn(2, tokens, 32, dtype=dtype)
    found = []
    for linear in (ours, usual):
        given = x.clone().requires_grad_()
        y = linear(given)
        y.backward(dy)
        found.append((linear.bias.grad, y, given.grad, linear.weight.grad))
    assert all(mine.dtype == dtype and mine.is_contiguous() for mine in found[0])
    (bias, *products), (exact_bias, *exact_products) = found
    assert torch.equal(bias, exact_bias)
    for mine, exact in zip(products, exact_products, strict=True):
        assert STEP / 10 < distance(mine, exact) < 2 * STEP


def test_linears_that_read_one_input_round_it_once(monkeypatch):
    """Until it is changed: 4 inputs of a layer; weights and gradients are each linear's own."""
    rounded, quantise = [], trained_fp8_linear.quantise_rows
    monkeypatch.setattr(trained_fp8_linear, "quantise_rows", lambda *x: rounded.append(x) or quantise(*x))
    model, (batch, _) = plain(torch.float32), padded()
    run(_in_fp8(model), batch)
    assert len(rounded) == (4 + 2 * 7) * LAYERS
    linear, x = TrainedFP8Linear(32, 16), torch.randn(3, 32)
    first = linear(x)
    assert torch.equal(linear(x), first)
    x *= torch.linspace(0.1, 3, 32)
    assert torch.equal(linear(x), linear(x.clone())) and not torch.equal(linear(x), first)


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
    assert_close(run(ours, batch), run(_reference(model), batch))


def test_evaluation_does_not_round():
    model, (batch, _) = plain(torch.float32), padded()
    assert_equal(run(_in_fp8(model).eval(), batch), run(model.eval(), batch))


def _are_in_fp8(run_) -> dict[str, bool]:
    """Of the linears, by name."""
    model, _ = sharded_model(run_)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {f"{name}.weight" for name in linears} < {name for name, _ in model.named_parameters()}
    return {name: isinstance(module, TrainedFP8Linear) for name, module in linears.items()}


def test_the_linears_of_the_layers_are_replaced_and_the_head_is_not(tiny_base, make_run, tmp_path):
    [usual] = run_ranks(_are_in_fp8, 1, make_run(tiny_base, tmp_path, "full"))
    [found] = run_ranks(_are_in_fp8, 1, make_run(tiny_base, tmp_path, "full", compute="fp8"))
    assert not any(usual.values())
    assert found == dict.fromkeys(usual, True) | {"lm_head": False}


@pytest.mark.parametrize("sizes", [(64, 120), (120, 64)])
def test_sizes_that_cannot_be_multiplied_are_refused(sizes):
    said = f"multiples of 16, here is one of {sizes[1]} x {sizes[0]}; use --set profile.compute=bf16"
    with pytest.raises(UsageError, match=said):
        TrainedFP8Linear(*sizes, bias=False, device="meta")


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
