"""profile.optimizer_state bf16_8bit in whole runs: it learns and resumes to the byte; ranks, offload change nothing.

Weights and gradients are bf16 numbers: between two numbers of ranks a gradient's last bit may differ, and with it what
a draw decides. So curves are held to bf16's rounding, which is also far less than a wrong row or step would make.
"""

import json
import shutil

import pytest
import torch
from ranks import run_ranks, train_here
from safetensors.torch import load_file

from fitune.config import run as runs
from fitune.errors import FituneError, UsageError
from fitune.launching.run_folder import refuse_another_resume
from fitune.model.head_loss import head_loss
from fitune.model.sharding import local_part
from fitune.optimizers import adamw_8bit, host_states
from fitune.training import loss
from fitune.weights.safetensors_files import Checkpoint

STEPS, SAVED = 8, 4
TRAINING = {
    "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "learning_rate": 5e-3, "warmup_steps": 2,
    "lr_scheduler_type": "cosine", "weight_decay": 0.1, "max_grad_norm": 0.5,
}  # fmt: skip
OPTIONS = {
    "batch": 8, "micro_batch": 2, "packing": True, "max_length": 112, "training": TRAINING,
    "optimizer_state": "bf16_8bit",
}  # fmt: skip
BF16_EPS = torch.finfo(torch.bfloat16).eps


def _curve(run, key: str = "loss") -> list[float]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if "loss" in line]


def _resumed(run, folder):
    """A copy of a finished run as if it had been killed after its first checkpoint."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}"))
    shutil.rmtree(folder / "model")
    return run.model_copy(update={"output_dir": str(folder), "resume": True})


def _same_but_for_bf16(found: list[float], expected: list[float]) -> None:
    assert len(found) == len(expected) == STEPS
    for step, (value, wanted) in enumerate(zip(found, expected, strict=True), 1):
        assert abs(value - wanted) <= step * BF16_EPS / 8 * wanted, f"step {step}: {value} is not {wanted}"


@pytest.mark.parametrize(
    ("base", "other_ranks", "offload"), [("uneven_base", 4, False), ("tied_base", 1, False), ("tied_base", 4, True)]
)
def test_a_resumed_run_is_the_uninterrupted_one_and_ranks_change_nothing(
    base, other_ranks, offload, make_run, tmp_path, request
):
    base, options = request.getfixturevalue(base), OPTIONS | {"optimizer_offload": offload}
    run = make_run(base, tmp_path / "run", "full", processes=2, **options)
    run_ranks(train_here, 2, run)
    losses = _curve(run)
    assert losses[-1] < 0.9 * losses[0]

    state = run.folder / f"checkpoints/checkpoint-{STEPS}/state"
    parts = [Checkpoint(part) for part in sorted(state.glob("rank-*"))]
    kinds = {name: info.dtype for part in parts for name, info in part.tensors.items()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert kinds["model.layers.0.mlp.up_proj.weight::exp_avg"] == torch.uint8
    assert kinds["model.layers.0.mlp.up_proj.weight::exp_avg_sq_root_scale"] == torch.float32
    assert kinds["model.norm.weight::exp_avg_sq_root"] == torch.float32

    again = _resumed(run, tmp_path / "again")
    run_ranks(train_here, 2, again)
    assert _curve(again) == losses
    assert _curve(again, "grad_norm") == _curve(run, "grad_norm")
    for name, tensor in load_file(run.result_folder / "model.safetensors").items():
        assert torch.equal(load_file(again.result_folder / "model.safetensors")[name], tensor), name

    elsewhere = make_run(base, tmp_path / "run", "full", processes=other_ranks, **options)
    elsewhere = _resumed(elsewhere, tmp_path / "elsewhere")
    run_ranks(train_here, other_ranks, elsewhere)
    _same_but_for_bf16(_curve(elsewhere), losses)


def test_offloaded_weights_train_the_same(uneven_base, make_run, tmp_path):
    curves = {}
    for offloaded in (False, True):
        run = make_run(uneven_base, tmp_path / str(offloaded), "full", offload_params=offloaded, **OPTIONS)
        run_ranks(train_here, 1, run)
        curves[offloaded] = _curve(run)
    assert curves[True] == curves[False]


def _train_in_small_pieces(run) -> None:
    """Several of a weight's rows make a piece, and several pieces a weight, as in large models."""
    host_states.PIECE = 2**12
    train_here(run)


def test_states_and_gradients_in_host_ram_train_the_same_and_resume_without_it(uneven_base, make_run, tmp_path):
    """Two passes a step, two ranks: equal to the bit, and a run may go on with them on the GPU."""
    curves = {}
    for offloaded in (False, True):
        options = OPTIONS | {"optimizer_offload": offloaded}
        run = make_run(uneven_base, tmp_path / str(offloaded), "full", processes=2, **options)
        assert run.gradient_accumulation_steps > 1
        run_ranks(_train_in_small_pieces, 2, run)
        curves[offloaded] = _curve(run), _curve(run, "grad_norm")
    assert curves[True] == curves[False]
    back = _resumed(run, tmp_path / "back")
    back = back.model_copy(update={"profile": run.profile.model_copy(update={"optimizer_offload": False})})
    run_ranks(train_here, 2, back)
    assert (_curve(back), _curve(back, "grad_norm")) == curves[True]


def _train_while_gradients_leave(run) -> None:
    """As on a GPU, where a gradient stays until the event of its copy has been waited for."""
    at_the_loss, freed, kept, beyond_its_own = [], [], [], []

    class Watched(host_states.HostGradients):
        def __init__(self, parameters, stay):
            super().__init__(parameters, stay)
            kept.append(self)
            self.stay = stay

        def release(self):
            freed.append(len(self._leaving))
            super().release()

    def watched_loss(*args):
        at_the_loss.append(sum(len(gradients._leaving) for gradients in kept))
        there = [local_part(p.grad) for gradients in kept for p in gradients.stay if p.grad is not None]
        beyond_its_own.extend(gradient.untyped_storage().nbytes() - gradient.nbytes for gradient in there)
        return head_loss(*args)

    host_states.Ring.event, host_states.Ring.wait = lambda ring: object(), lambda ring, event: None
    adamw_8bit.HostGradients, loss.head_loss = Watched, watched_loss
    train_here(run)
    assert len(at_the_loss) == STEPS * run.gradient_accumulation_steps and not any(at_the_loss)
    assert sum(map(bool, freed)) >= STEPS, "none was on its way: this shows nothing"
    assert beyond_its_own and not any(beyond_its_own), "a small gradient keeps the buffer of a whole layer's"


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_gradient_of_the_pass_before_lies_on_the_gpu_while_the_loss_is_computed(
    ranks, tiny_base, make_run, tmp_path
):
    """On two ranks FSDP makes all gradients of a layer as parts of one buffer, which each of them keeps alive."""
    options = OPTIONS | {"optimizer_offload": True, "training": TRAINING | {"save_strategy": "no"}}
    run = make_run(tiny_base, tmp_path / "run", "full", processes=ranks, **options)
    assert run.gradient_accumulation_steps > 1
    run_ranks(_train_while_gradients_leave, ranks, run)


def test_it_learns_what_float32_learns(uneven_base, make_run, tmp_path):
    training = TRAINING | {"max_steps": 24, "save_strategy": "no", "learning_rate": 1e-3}
    last = {}
    for kind in ("fp32", "bf16_8bit"):
        options = OPTIONS | {"training": training, "optimizer_state": kind}
        run = make_run(uneven_base, tmp_path / kind, "full", **options)
        run_ranks(train_here, 1, run)
        last[kind] = sum(_curve(run)[-4:]) / 4
        first = _curve(run)[0]
    assert last["fp32"] < 0.9 * first
    assert abs(last["bf16_8bit"] - last["fp32"]) <= 0.1 * (first - last["fp32"])


def test_in_bf16_as_on_gpus_losses_are_those_of_float32_states_on_any_number_of_ranks(tiny_base, make_run, tmp_path):
    """Else tests compute in float32 and nothing is cast. Before the first step all have the same weights."""
    training = TRAINING | {"save_strategy": "no", "max_steps": 3, "learning_rate": 1e-3}
    options = OPTIONS | {"batch": 4, "micro_batch": 1, "packing": False, "training": training}
    curves = {}
    for states, ranks in (("bf16_8bit", 1), ("fp32", 2)):
        of_kind = options | {"optimizer_state": states, "mixed_precision": "bf16"}
        run = make_run(tiny_base, tmp_path / states, "full", processes=ranks, **of_kind)
        run_ranks(train_here, ranks, run)
        curves[states] = _curve(run)
    assert curves["bf16_8bit"][0] == pytest.approx(curves["fp32"][0], rel=1e-5)
    assert curves["bf16_8bit"] == pytest.approx(curves["fp32"], rel=2 * BF16_EPS)
    assert curves["fp32"][-1] < 0.99 * curves["fp32"][0]


def _poisoned(run) -> tuple[str, list[bool]]:
    """Trains with gradients that are not finite in the third step; the error, and whether any weight is bad then."""
    from fitune.optimizers.adamw_8bit import AdamW8bit

    clip, take, found = AdamW8bit.clip, host_states.HostGradients._take, []

    def poison(self, max_norm):
        found.append(self)
        if len(found) == 3 and not run.profile.optimizer_offload:
            self.param_groups[0]["params"][0].grad.mul_(float("inf"))
        return clip(self, max_norm)

    def poison_on_the_way(self, parameter):
        if len(found) == 2 and parameter is next(iter(self.of)):
            parameter.grad.mul_(float("inf"))
        take(self, parameter)

    AdamW8bit.clip, host_states.HostGradients._take = poison, poison_on_the_way
    with pytest.raises(FituneError) as caught:
        train_here(run)
    weights = [p.to_local() for group in found[0].param_groups for p in group["params"]]
    return str(caught.value), all(weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize("offload", [False, True])
def test_a_step_that_is_not_finite_stops_all_ranks_before_the_weights_change(offload, tiny_base, make_run, tmp_path):
    options = OPTIONS | {"training": TRAINING | {"save_strategy": "no"}, "optimizer_offload": offload}
    run = make_run(tiny_base, tmp_path, "full", processes=2, **options)
    for message, finite in run_ranks(_poisoned, 2, run):
        assert message.startswith("step 3: the gradient's norm is ")
        assert finite


@pytest.mark.parametrize(
    ("recipe", "sets", "said"),
    [
        ("tiny_lora", (), "is for method full, recipe tiny_lora is lora"),
        ("tiny_qlora", (), "is for method full, recipe tiny_qlora is qlora"),
        ("tiny_full", ("training.optim=sgd",), "is AdamW's, recipe tiny_full has training.optim sgd; remove it"),
    ],
)
def test_it_is_refused_where_it_would_not_act(recipe, sets, said):
    with pytest.raises(UsageError, match=said) as refused:
        runs.resolve(recipe, "cpu_2proc", ("profile.optimizer_state=bf16_8bit", *sets))
    assert "use --set profile.optimizer_state=fp32" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (("profile.optimizer_offload=true",), "is for small optimizer states; add --set profile.optimizer_state="),
        (
            ("profile.optimizer_offload=true", "profile.optimizer_state=bf16_8bit"),
            "keeps the weights on the GPU, .*offloaded.yaml has fsdp_offload_params true",
        ),
    ],
)
def test_states_in_host_ram_are_refused_where_they_would_not_act(sets, said, tmp_path):
    offloaded = tmp_path / "offloaded.yaml"
    shipped = runs.find("cpu_2proc", runs.ACCELERATE_CONFIGS, "accelerate config").read_text()
    offloaded.write_text(shipped.replace("fsdp_version: 2", "fsdp_version: 2\n  fsdp_offload_params: true"))
    config = (f"profile.accelerate_config={offloaded}",) if len(sets) > 1 else ()
    with pytest.raises(UsageError, match=said) as refused:
        runs.resolve("tiny_full", "cpu_2proc", (*sets, *config))
    assert "use --set profile.optimizer_offload=false" in str(refused.value)


def test_a_run_goes_on_with_the_states_its_checkpoints_hold(tmp_path):
    run = runs.resolve("tiny_full", "cpu_2proc", ("profile.optimizer_state=bf16_8bit",), str(tmp_path))
    (tmp_path / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    assert runs.resolve_again(tmp_path).profile.optimizer_state == "bf16_8bit"
    with pytest.raises(UsageError, match=r"use --set profile\.optimizer_state=bf16_8bit"):
        refuse_another_resume(runs.resolve_again(tmp_path, "cpu_2proc"))
