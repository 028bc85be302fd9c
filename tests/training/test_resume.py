"""A resumed run ends with the bytes of an uninterrupted one, and its checkpoints fit any number of ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, sharded_model, train_here, whole
from rounding import additions_to_a_step, assert_curve_equal_but_for_rounding, assert_equal_but_for_rounding
from torch.distributed.tensor import DTensor, distribute_tensor

from fitune.errors import FituneError, UsageError
from fitune.launching.heartbeat import Heartbeat
from fitune.model.sharding import Share, local_part
from fitune.training.resume_point import checkpoint_to_resume
from fitune.training.state import load_optimizer_state, load_trainable_weights, training_state, write_training_state
from fitune.weights.safetensors_files import Checkpoint

STEPS, SAVED = 8, 5
TRAINING = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVED,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
}


def _metrics(run) -> list[dict]:
    """The logged lines but for what a clock measured."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    keys = ("step", "loss", "grad_norm", "learning_rate", "epoch", "mean_token_accuracy", "num_tokens")
    return [{key: line[key] for key in keys} for line in steps]


def _bytes(folder: Path) -> dict[str, bytes]:
    files = sorted(
        file for file in folder.rglob("*") if file.suffix in (".safetensors", ".pt") or "layout" in file.name
    )
    assert files
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _interrupted_copy(run, folder: Path):
    """`run` as if it had been killed while it wrote the checkpoint after the first one."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}"))
    half_written = folder / "checkpoints" / f".checkpoint-{SAVED + 1}.partial"
    half_written.mkdir()
    (half_written / "trainer_state.json").write_text("{}")
    (folder / "checkpoints" / f"checkpoint-{SAVED + 2}").mkdir()  # as other trainers leave it
    for file in (folder / run.result_folder.name).glob("*.safetensors"):
        file.write_bytes(b"")
    return run.model_copy(update={"output_dir": str(folder), "resume": True})


@pytest.mark.parametrize(
    ("method", "base", "compute"),
    [
        ("full", "tiny_base", "bf16"),
        ("full", "tied_base", "bf16"),
        ("full", "tiny_base", "fp8"),
        ("lora", "tiny_base", "bf16"),
        ("lora", "tiny_base", "fp8"),
        ("qlora", "tiny_base", "bf16"),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(method, base, compute, make_run, tmp_path, request):
    """On two ranks, packed, accumulated, resumed within the second epoch, with dropout; then on one rank."""
    options = {"batch": 16, "micro_batch": 4, "packing": True, "max_length": 112, "training": TRAINING}
    options |= {"compute": compute}
    options |= {"lora": {"dropout": 0.2}} if method == "qlora" else {}
    base = request.getfixturevalue(base)
    run = make_run(base, tmp_path / "run", method, processes=2, **options)
    run_ranks(train_here, 2, run)
    metrics = _metrics(run)
    assert metrics[2]["epoch"] == 1
    assert metrics[SAVED - 1]["epoch"] % 1 > 0.5
    assert {path.name for path in (run.folder / "checkpoints").iterdir()} == {f"checkpoint-{n}" for n in (SAVED, STEPS)}

    resumed = _interrupted_copy(run, tmp_path / "resumed")
    run_ranks(train_here, 2, resumed)
    assert _metrics(resumed) == metrics
    assert _bytes(resumed.result_folder) == _bytes(run.result_folder)
    last = f"checkpoints/checkpoint-{STEPS}"
    # weights, both moments, hyperparameters, scheduler; each rank's random state is in *.pth
    assert _bytes(resumed.folder / last) == _bytes(run.folder / last)
    parts = sorted((run.folder / last / "state").glob("rank-*"))
    assert len(parts) == 2
    for part in map(Checkpoint, parts):  # an adapter's weights are beside them, once
        assert any("::exp_avg" in name for name in part.tensors)
        assert any("::" not in name for name in part.tensors) == (method == "full")
    assert len(list((run.folder / last).glob("rng_state*"))) == 2

    if method != "lora" and compute == "bf16":
        # another number of processes and micro batch train on the same rows, with the same dropout; in fp8 a sum's last
        # bit may take a number to the next one, and method full has scales over all tokens of a pass
        alone = make_run(base, tmp_path / "run", method, processes=1, **options | {"micro_batch": 8})
        alone = _interrupted_copy(alone, tmp_path / "alone")
        run_ranks(train_here, 1, alone)
        for key in ("loss", "grad_norm", "learning_rate", "epoch"):
            found, expected = ([line[key] for line in lines] for lines in (_metrics(alone), metrics))
            assert_curve_equal_but_for_rounding(found, expected, additions_to_a_step(alone), of=key)
    if method == "full":
        elsewhere = resumed.model_copy(update={"output_dir": str(tmp_path / "elsewhere")})
        assert checkpoint_to_resume(elsewhere, None, Heartbeat()) is None
        (elsewhere.folder / "checkpoints/checkpoint-3").mkdir(parents=True)
        with pytest.raises(UsageError, match="no whole checkpoint to resume from"):
            checkpoint_to_resume(elsewhere, None, Heartbeat())


def _optimizer(model, lr: float) -> torch.optim.Optimizer:
    """Two groups, as Trainer makes them: weight decay for matrices only."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 0.3},
            {"params": [p for p in trainable if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=lr,
    )


def _step(model, optimizer, seed: int) -> None:
    """One step with gradients that depend on the seed only, not on the number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
    optimizer.step()


def _whole_state(model, optimizer) -> dict[str, torch.Tensor]:
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state[name] = whole(parameter).detach().clone()
            for key, value in optimizer.state[parameter].items():
                state[f"{name} {key}"] = (whole(value) if value.ndim else value).clone()
    return state


def _hyperparameters(optimizer) -> list[dict]:
    return [{k: tuple(v) if k == "betas" else v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def _save(runs: dict, folder: Path) -> dict:
    report = {}
    for case, run in runs.items():
        model, _ = sharded_model(run)
        optimizer = _optimizer(model, lr=0.01)
        for seed in range(3):
            _step(model, optimizer, seed)
        optimizer.param_groups[0]["lr"] = 0.005
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        write_training_state(folder / case, training_state(model, optimizer, world_size, weights=True), rank)
        report[case] = {"state": _whole_state(model, optimizer), "groups": _hyperparameters(optimizer)}
        _step(model, optimizer, 3)
        report[case]["next"] = _whole_state(model, optimizer)
    torch.distributed.barrier()
    return report


def _load(runs: dict, folder: Path) -> dict:
    report = {}
    for case, run in runs.items():
        model, _ = sharded_model(run)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    local_part(parameter).fill_(7)
        optimizer = _optimizer(model, lr=1.0)
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        load_trainable_weights(folder / case, model, Share(rank, world_size))
        load_optimizer_state(folder / case, model, optimizer, Share(rank, world_size))
        report[case] = {"state": _whole_state(model, optimizer), "groups": _hyperparameters(optimizer)}
        _step(model, optimizer, 3)
        report[case]["next"] = _whole_state(model, optimizer)
    return report


ADAMW = 10
"Operations one after another on a weight: decay, both moments and their corrections, root, eps, quotient, step."


def _assert_same_state(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, (1, 3)), (3, (2,))])
def test_state_is_read_back_exactly_on_any_number_of_ranks(saved_on, loaded_on, uneven_base, make_run, tmp_path):
    def runs(world_size):
        lora = {"r": 5, "trainable_tokens": ["<|eot_id|>"]}
        return {
            "full": make_run(uneven_base, tmp_path, "full", processes=world_size),
            "lora": make_run(uneven_base, tmp_path, "lora", processes=world_size, lora=lora),
        }

    expected = run_ranks(_save, saved_on, runs(saved_on), tmp_path)[0]
    assert any("exp_avg_sq" in name for name in expected["lora"]["state"])
    assert {float(v) for name, v in expected["full"]["state"].items() if name.endswith("step")} == {3}
    for world_size in loaded_on:
        for found in run_ranks(_load, world_size, runs(world_size), tmp_path):
            for case, report in expected.items():
                _assert_same_state(found[case]["state"], report["state"])
                assert found[case]["groups"] == report["groups"]
                # A kernel rounds a share's last values otherwise than those that fill its vectors.
                for name, value in report["next"].items():
                    assert_equal_but_for_rounding(found[case]["next"][name], value, roundings=ADAMW, of=(case, name))


def _load_errors(run, folders: list[Path]) -> list[str]:
    model, _ = sharded_model(run)
    messages = []
    for folder in folders:
        with pytest.raises(FituneError) as caught:
            load_trainable_weights(folder, model, Share(0, 1))
        messages.append(str(caught.value))
    return messages


def test_unfit_state_is_refused_by_name(tiny_base, make_run, tmp_path):
    run_ranks(_save, 2, {"good": make_run(tiny_base, tmp_path, "lora", processes=2)}, tmp_path)
    for name in ("no layout", "no rank"):
        shutil.copytree(tmp_path / "good", tmp_path / name)
    (tmp_path / "no layout/state/layout.json").unlink()
    shutil.rmtree(tmp_path / "no rank/state/rank-00001-of-00002")
    folders = [tmp_path / name for name in ("good", "no layout", "no rank")]
    run = make_run(tiny_base, tmp_path, "lora", lora={"r": 6})
    shape, layout, rank = run_ranks(_load_errors, 1, run, folders)[0]
    assert "lora_A" in shape
    assert "[4, 64], the model needs [6, 64]" in shape
    assert "no layout: not a checkpoint of fitune: state/layout.json" in layout
    assert "rank-00001-of-00002" in rank
