"""Every optimizer that is accepted trains sharded and offloaded and resumes to the byte, on other ranks to rounding."""

import json
import shutil

import pytest
import torch
from ranks import run_ranks, train_here
from rounding import additions_to_a_step, assert_curve_equal_but_for_rounding
from safetensors.torch import load_file

from fitune.config.optimizers import ARGUMENTS
from fitune.model.sharding import Share
from fitune.training.arguments import own_optimizer, training_arguments
from fitune.training.state import load_optimizer_state, training_state, write_training_state

STEPS, SAVED = 4, 2
CASES = {name: None for name in ARGUMENTS} | {
    "sgd with momentum": "momentum=0.9", "rmsprop centered": "centered=true,momentum=0.5", "adagrad": "lr_decay=0.1",
}  # fmt: skip


def _losses(run) -> list[float]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def _resumed(run, folder):
    """A copy of a finished run as if it had been killed after its first checkpoint."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}", "adapter_model*"))
    shutil.copytree(  # the checkpoint's adapter is needed
        run.folder / "checkpoints", folder / "checkpoints", dirs_exist_ok=True,
        ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}"),
    )  # fmt: skip
    return run.model_copy(update={"output_dir": str(folder), "resume": True})


@pytest.mark.parametrize("case", CASES)
def test_an_optimizer_that_is_accepted_resumes_exactly(case, tiny_base, make_run, tmp_path):
    name = case.split()[0]
    training = {
        "optim": name, "optim_args": CASES[case], "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED,
        "learning_rate": 1e-3, "weight_decay": 0.1,
    }  # fmt: skip
    options = {"batch": 4, "training": training, "offload_params": True}
    run = make_run(tiny_base, tmp_path / "run", "lora", processes=2, **options)
    run_ranks(train_here, 2, run)
    losses = _losses(run)
    adapter = "adapter_model.safetensors"
    trained = load_file(run.result_folder / adapter)
    assert len(losses) == STEPS and all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)

    resumed = _resumed(run, tmp_path / "resumed")
    run_ranks(train_here, 2, resumed)
    assert _losses(resumed) == losses
    assert (resumed.result_folder / adapter).read_bytes() == (run.result_folder / adapter).read_bytes()

    alone = _resumed(make_run(tiny_base, tmp_path / "run", "lora", **options), tmp_path / "alone")
    run_ranks(train_here, 1, alone)
    assert_curve_equal_but_for_rounding(_losses(alone), losses, additions_to_a_step(alone), of="loss")


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if "fused" not in name])
def test_a_whole_model_is_stepped_weight_by_weight(name, tiny_base, make_run, tmp_path):
    """On a GPU torch else makes the intermediate results of all weights at once: 1.7 GiB above plan's peak for 1B."""
    run = make_run(tiny_base, tmp_path / "run", "full", training={"optim": name})
    kind, options = own_optimizer(run, training_arguments(run))
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    assert kind(weights, **options).param_groups[0]["foreach"] is False


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.AdamW])
def test_a_checkpoint_from_before_is_stepped_weight_by_weight_too(kind, tmp_path):
    """Its layout says how the run that wrote it computed. The rest of it counts."""
    model = torch.nn.Linear(3, 2)
    before, now = kind(model.parameters(), lr=0.1), kind(model.parameters(), lr=0.2, foreach=False)
    model(torch.ones(1, 3)).sum().backward()
    before.step()
    write_training_state(tmp_path, training_state(model, before, 1, weights=True), 0)
    load_optimizer_state(tmp_path, model, now, Share(0, 1))
    (group,) = now.param_groups
    assert group["foreach"] is False and group["lr"] == 0.1
    for parameter in model.parameters():
        assert now.state[parameter].keys() == before.state[parameter].keys()
