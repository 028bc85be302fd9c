"""A step whose gradient is not finite never reaches the weights."""

import json
import re
import shutil

import pytest
import torch
from ranks import run_ranks, train_here
from safetensors.torch import load_file, save_file

from fitune.errors import FituneError


def not_a_number(loss: torch.Tensor) -> torch.Tensor:
    return loss * torch.nan


def finite_with_a_gradient_that_is_not(loss: torch.Tensor) -> torch.Tensor:
    return loss + (0 * loss).sqrt()


def poisoned(run, poison_of=not_a_number) -> tuple[str, str]:
    """Trains with a poisoned loss on the last rank in the third step; the error, and that batch's text."""
    import torch.distributed as dist

    from fitune.training.trainer import ShardedSFTTrainer

    compute_loss = ShardedSFTTrainer.compute_loss
    texts = []

    def poison(self, model, inputs, *args, **kwargs):
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        if self.state.global_step != 2 or dist.get_rank() != dist.get_world_size() - 1:
            return loss
        texts.append(self.processing_class.decode(inputs["input_ids"].flatten()))
        return poison_of(loss)

    ShardedSFTTrainer.compute_loss = poison
    with pytest.raises(FituneError) as caught:
        train_here(run)
    return str(caught.value), "".join(texts)


@pytest.mark.parametrize(
    ("method", "packing", "replicas"), [("full", False, 1), ("qlora", True, 1), ("lora", False, 2)]
)
def test_all_ranks_stop_before_the_optimizer_step(method, packing, replicas, make_run, tiny_base, prepared, tmp_path):
    training = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    options = {"processes": 2, "replicas": replicas, "batch": 2, "packing": packing, "training": training}
    run = make_run(tiny_base, tmp_path, method, **options)
    (message, _), (other_message, text) = run_ranks(poisoned, 2, run)
    assert message == other_message
    assert message.startswith("step 3: the gradient's norm is nan; loss is not finite on rank 1: ")
    named = {int(line) for line in re.findall(r"train\.jsonl:(\d+)", message)}
    lines = (prepared / "train.jsonl").read_text().splitlines()
    assert named == {
        n for n, line in enumerate(lines, 1) if all(m["content"] in text for m in json.loads(line)["messages"])
    }
    assert len(named) > 1 if packing else len(named) == 1
    checkpoints = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-1", "checkpoint-2"], "no checkpoint of the bad step"
    assert not run.result_folder.exists()


def test_a_gradient_that_is_not_finite_stops_them_too(make_run, tiny_base, tmp_path):
    """Whatever the losses say; then the rows of all ranks are named."""
    training = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    run = make_run(tiny_base, tmp_path, "lora", processes=2, batch=2, training=training)
    (message, _), (other_message, _) = run_ranks(poisoned, 2, run, finite_with_a_gradient_that_is_not)
    assert message == other_message
    assert message.startswith("step 3: the gradient's norm is nan; all losses are finite: ")
    assert len(set(re.findall(r"train\.jsonl:(\d+)", message))) == 2, "a row of each rank"
    checkpoints = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-1", "checkpoint-2"], "no checkpoint of the bad step"


def refusal(run) -> str:
    with pytest.raises(FituneError) as caught:
        train_here(run)
    return str(caught.value)


def test_where_no_row_has_a_finite_loss_from_the_first_step_on_the_base_is_named(make_run, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    run = make_run(base, tmp_path / "run", "lora", processes=3, batch=4, training={"max_steps": 2})  # 2 fillers
    for message in run_ranks(refusal, 3, run):
        assert message.endswith("no row has a finite loss, so look at the base: its weights may not be finite")
