"""What `plan` says of time and money: the parts of a step, the number of steps, their price."""

import json
import re
from dataclasses import replace

import pytest

from fitune.config.model_shapes import find_shape
from fitune.errors import UsageError
from fitune.planning.fill import resolve
from fitune.planning.gpu_models import GPU_MODELS, gpu_model
from fitune.planning.limits import limits_of
from fitune.planning.plan import TIME_ERROR, make_plan, setup_of
from fitune.planning.run_length import steps_of
from fitune.planning.step_time import step_seconds


def test_each_part_of_a_step_is_what_moves_it():
    h100 = gpu_model("H100")

    def parts(recipe: str, profile: str, *sets: str, **machines) -> dict[str, float]:
        run = resolve(recipe, profile, sets)
        return step_seconds(setup_of(run, find_shape(run.recipe.base.model)), h100, **machines)

    one, two = (parts("llama3_8b_full", "fsdp_offload_1x80gb", f"profile.micro_batch={rows}") for rows in (16, 8))
    assert one["adding gradients"] == 0 and two["adding gradients"] == pytest.approx(26.8, abs=0.1)  # measured: 27
    assert one["optimizer"] == two["optimizer"] and one["total"] < two["total"] / 2

    parameters, link, ram = 8_030_261_248, 64e9 * 0.85 * 1.36, 20e9
    assert one["optimizer"] == pytest.approx(parameters * 4 * (7 / link + 1 / ram))  # 4 numbers in, 3 out; the norm
    on_cpu = parts("llama3_8b_full", "fsdp_offload_1x80gb", "training.optim=rmsprop", "profile.micro_batch=16")
    # a weight and its one moment there and back, its gradient twice: AdamW's eight numbers took 13 s
    assert on_cpu["optimizer"] == pytest.approx(parameters * 4 * 6 / ram)

    adapter, alone = (
        parts("llama3_70b_qlora", profile, "profile.micro_batch=1")
        for profile in ("fsdp_offload_4gpu", "fsdp_offload_1x12gb")
    )
    numbers = 80 * 2_588_672  # 16 (in + out) of a layer's linears
    assert alone["optimizer"] == pytest.approx(numbers * 4 * (7 / link + 1 / ram))
    assert adapter["optimizer"] == pytest.approx(
        numbers * 4 * (7 / 4 / link + 1 / ram)
    )  # four links, one machine's RAM
    assert parts("llama3_70b_qlora", "fsdp_1x48gb")["network"] == 0 < adapter["network"]

    one_row = ("profile.micro_batch=1", "profile.kept_layers=0")
    kept, moved = (
        parts("llama3_70b_qlora", "fsdp_4x24gb", *one_row, f"profile.activation_offload={on}") for on in (False, True)
    )
    sent = 2 * 80 * 3072 * 8192 * 2 * 2  # out and in, 80 inputs of layers in bf16, 2 passes
    assert moved["host link"] - kept["host link"] == pytest.approx(sent / (64e9 * 0.85))

    slow, fast = (parts("llama3_70b_full", "fsdp_full_16x80gb", network_gb_s=speed) for speed in (10, 20))
    assert slow["total"] - slow["optimizer"] == pytest.approx(2 * (fast["total"] - fast["optimizer"]))


def test_kept_attention_is_not_computed_again():
    h200, rows = gpu_model("H200"), ("profile.micro_batch=1", "profile.kept_layers=30", "global_batch_size=1")
    setup = setup_of(resolve("llama3_70b_qlora", "fsdp_1x48gb", rows), find_shape("meta-llama/Meta-Llama-3-70B"))
    for max_length in (4096, 32_768):
        once, twice = (replace(setup, max_length=max_length, kept_attention=keeps) for keeps in (True, False))
        pairs, of_peak = max_length**2 / 2, 0.55 * max_length / (max_length + 1100)
        forward = 4 * pairs * 8192 * 50 / (989e12 * of_peak)  # 64 heads of 128, 50 layers that are not kept
        saved = step_seconds(twice, h200)["compute"] - step_seconds(once, h200)["compute"]
        assert saved == pytest.approx(forward)


def test_forward_and_backward_each_take_what_is_slower_in_them():
    """In fp8 a layer of 70B computes forward for less time than its weights travel, and backward for more."""
    h200, rate = gpu_model("H200"), 64e9 * 0.85

    def parts(compute: str) -> dict[str, float]:
        sets = (f"profile.compute={compute}", "profile.micro_batch=1", "profile.kept_layers=2", "global_batch_size=4")
        run = resolve("llama3_70b_qlora", "fsdp_offload_1x12gb", sets)
        return step_seconds(setup_of(run, find_shape(run.recipe.base.model)), h200)

    bf16, fp8 = parts("bf16"), parts("fp8")
    assert bf16["total"] == pytest.approx(bf16["compute"] + bf16["optimizer"])
    head_and_rows = 4 * (128_256 + 3072) * 8192 * 2 / rate  # of 4 passes: forward alone
    forward = (fp8["host link"] + head_and_rows) / 2
    backward = fp8["compute"] * (1 - 1 / (2 + 78 / 80))
    assert fp8["host link"] - forward < backward and forward > fp8["compute"] - backward
    assert fp8["total"] == pytest.approx(forward + backward + fp8["optimizer"])
    assert fp8["total"] == pytest.approx(7.25, rel=TIME_ERROR)  # failed-peers-h200x4-2026-11-28b.json


def test_gradients_travel_in_what_layers_inputs_leave_of_the_link():
    sets = ("profile.micro_batch=1", "profile.kept_layers=0", "global_batch_size=2", "profile.activation_offload=true")
    run = resolve("llama3_8b_full", "full_1x24gb", sets)
    setup, slow = setup_of(run, find_shape(run.recipe.base.model)), replace(gpu_model("H200"), host_link_gb_s=1)
    parts = step_seconds(setup, slow)
    gradients = 3 * 8_030_261_248 * 2  # bf16: out, and for the second pass in and out
    assert parts["host link"] == pytest.approx(2 * 2 * 32 * 3072 * 4096 * 2 / 0.85e9) and parts["compute"] < 1
    assert parts["gradients to host RAM"] == pytest.approx(gradients / (0.85e9 * 1.36))


def test_layers_that_stay_on_the_gpu_travel_once():
    """As an accelerate config may ask: until the backward pass, of method full to the end of the step."""
    h100, passes = gpu_model("H100"), ("profile.micro_batch=1", "global_batch_size=4")
    for recipe, profile, at_most in (
        ("llama3_8b_full", "fsdp_offload_1x80gb", 1),
        ("llama3_70b_qlora", "fsdp_offload_1x24gb", 4),
    ):
        run = resolve(recipe, profile, passes)
        setup = setup_of(run, find_shape(run.recipe.base.model))
        travel, stay = (step_seconds(replace(setup, reshard=reshard), h100)["host link"] for reshard in (True, False))
        layers = setup.shape.layers * setup.layer_weights / (h100.host_link_gb_s * 0.85e9)
        assert travel - stay == pytest.approx((2 * setup.accumulation - at_most) * layers)


def test_steps_come_from_what_prepare_counted(tmp_path):
    report = {"max_length": 3072, "packing": True, "packed_rows": 100, "packing_efficiency": 0.9, "train_rows": 700,
              "tokens": {"total": 276_480}}  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(report))
    at = f"data.prepared={tmp_path}"
    assert steps_of(resolve("llama3_70b_qlora", "fsdp_4x24gb", (at,))) == 13 * 3  # 100 rows, 8 a step, 3 epochs
    assert steps_of(resolve("llama3_70b_qlora", "fsdp_4x24gb", (at, "max_length=1536"))) == 25 * 3
    assert steps_of(resolve("llama3_70b_qlora", "fsdp_4x24gb", (at, "training.max_steps=7"))) == 7
    (tmp_path / "report.json").write_text("{")
    assert steps_of(resolve("llama3_70b_qlora", "fsdp_4x24gb", (at,))) is None


def test_money_is_hours_times_price():
    run = resolve("llama3_70b_qlora", "fsdp_4x24gb", ("training.max_steps=100",))
    plan = make_plan(run, limits_of(run), price=2.0)
    assert plan.time.cost == pytest.approx(plan.time.hours * 2.0)
    assert plan.time.hours == pytest.approx(100 * plan.time.parts["total"] / 3600)
    tokens = run.recipe.global_batch_size * run.recipe.max_length  # of a step
    assert plan.time.tokens_per_second == pytest.approx(tokens / plan.time.parts["total"])


@pytest.mark.parametrize("name", [model.name for model in GPU_MODELS if not model.has_bf16])
def test_a_gpu_without_bf16_is_refused_in_one_line_wherever_it_would_be_timed(name):
    """It has no rate to divide by."""
    gpu, said = gpu_model(name), rf"^{re.escape(name)} has compute capability \d\.\d and no bf16, .*; use a newer GPU$"
    run = resolve("llama3_8b_qlora", "single_gpu")
    for call in (
        lambda: resolve("llama3_8b_qlora", "single_gpu", gpu=gpu),
        lambda: resolve("llama3_8b_qlora", "single_gpu", ("profile.micro_batch=1", "profile.kept_layers=0"), gpu=gpu),
        lambda: make_plan(run, limits_of(run), gpu),
    ):
        with pytest.raises(UsageError, match=said):
            call()


def test_a_run_on_the_cpu_is_filled_beside_any_gpu():
    sets = ("base.model=meta-llama/Llama-3.2-1B", "profile.micro_batch=auto", "profile.kept_layers=auto")
    beside_none = resolve("tiny_qlora", "cpu_2proc", sets)
    assert resolve("tiny_qlora", "cpu_2proc", sets, gpu=gpu_model("T4")).profile == beside_none.profile
