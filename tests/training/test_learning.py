"""Training learns what a plain, single-process TRL, PEFT and bitsandbytes run learns, however it is spread out."""

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from ranks import run_alone, run_ranks, sharded_model, train_here, whole
from rounding import additions_to_a_step, assert_curve_equal_but_for_rounding, assert_trained_equal_but_for_rounding
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from fitune.data.dataset import load_tokenizer

STEPS = 14
TRAINING = {
    "max_steps": STEPS,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "max_grad_norm": 0.5,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
}

SPREAD = {
    "one process": {"processes": 1, "micro_batch": 8},
    "accumulated": {"processes": 1, "micro_batch": 2},
    "two ranks and accumulated": {"processes": 2, "micro_batch": 2},
}


def _curve(log_history: list[dict]) -> dict[str, torch.Tensor]:
    steps = [line for line in log_history if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    keys = ("epoch", "loss", "grad_norm")
    return {key: torch.tensor([line[key] for line in steps], dtype=torch.float64) for key in keys}


def _metrics(run) -> dict[str, torch.Tensor]:
    return _curve([json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()])


def _assert_same_curve(found: dict, expected: dict, additions: int, name: str) -> None:
    """A wrong scale, a lost micro batch or a row counted twice shows at 1e-3 and more, in the first step already."""
    for key in ("epoch", "loss", "grad_norm"):
        assert_curve_equal_but_for_rounding(found[key].tolist(), expected[key].tolist(), additions, of=(name, key))


def _initial_adapter(run) -> dict[str, torch.Tensor]:
    model, _ = sharded_model(run)
    return {
        name.replace(".default", ""): whole(parameter).detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _plain_model(run, adapter: dict[str, torch.Tensor]):
    recipe = run.recipe
    model = LlamaForCausalLM.from_pretrained(recipe.base.model, dtype=torch.float32)
    if recipe.method == "full":
        return model
    if recipe.method == "qlora":
        for layer in model.model.layers:
            for name, module in list(layer.named_modules()):
                if isinstance(module, torch.nn.Linear):
                    quantised = bnb.nn.Linear4bit(
                        module.in_features, module.out_features, bias=False, quant_type="nf4", compress_statistics=True
                    )
                    quantised.load_state_dict(module.state_dict())
                    parent, _, child = name.rpartition(".")
                    setattr(layer.get_submodule(parent), child, quantised.to("cpu"))
    config = LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    set_peft_model_state_dict(model, adapter)
    return model


def _plain_run(run, adapter: dict[str, torch.Tensor], batch: int):
    """TRL's trainer as its documentation has it: nothing of fitune's but the rows and the tokenizer."""
    base = Path(run.recipe.base.model)
    arguments = SFTConfig(
        output_dir=str(run.folder / "plain"),
        per_device_train_batch_size=batch,
        max_length=run.recipe.max_length,
        packing=run.recipe.packing,
        assistant_only_loss=True,
        seed=run.recipe.seed,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        **TRAINING,
    )
    model = _plain_model(run, adapter)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        processing_class=load_tokenizer(run.recipe, base),
        train_dataset=load_dataset(
            "json",
            data_files=f"{run.recipe.data.prepared}/train.jsonl",
            split="train",
            cache_dir=str(run.folder / "cache"),
        ),
    )
    trainer.train()
    trained = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return _curve(trainer.state.log_history), trained


@pytest.mark.parametrize(("method", "packing"), [("full", False), ("lora", False), ("lora", True), ("qlora", False)])
def test_losses_match_a_plain_run_and_do_not_depend_on_the_spread(method, packing, tiny_base, make_run, tmp_path):
    # packed, the conversations fill 40 rows of 96 tokens; not packed, they are 48 rows: whole batches of 8
    options = {"batch": 8, "training": TRAINING, "max_length": 96 if packing else 256, "packing": packing, "seed": 7}
    options |= {"lora": {"r": 8, "alpha": 64}} if method != "full" else {}
    spreads = (
        SPREAD if method == "full" else {name: SPREAD[name] for name in ("one process", "two ranks and accumulated")}
    )
    runs = {name: make_run(tiny_base, tmp_path / name, method, **options, **spread) for name, spread in spreads.items()}
    first = runs["one process"]
    adapter = {} if method == "full" else run_ranks(_initial_adapter, 1, first)[0]
    plain, trained = run_alone(_plain_run, first, adapter, 8)

    assert len(plain["loss"]) == STEPS
    assert plain["epoch"][4 if packing else 5] == 1
    assert plain["loss"][-3:].mean() < plain["loss"][:3].mean() - 0.2, "the plain run does not learn"
    for name, run in runs.items():
        run_ranks(train_here, run.accelerate.num_processes, run)
        _assert_same_curve(_metrics(run), plain, additions_to_a_step(run), name)
        result = load_file(next(run.result_folder.glob("*model.safetensors")))
        assert set(result) == set(trained)
        for key, weight in trained.items():
            assert_trained_equal_but_for_rounding(result[key], weight, additions_to_a_step(run), of=(name, key))


@pytest.mark.parametrize(("batch", "micro_batch"), [(10, 5), (32, 16)])
def test_last_batch_of_an_epoch_counts_every_row_once(batch, micro_batch, tiny_base, make_run, tmp_path):
    """48 rows are no multiple of the batch: two ranks share what is left, 5 and 3 rows, or 16 and none at all."""
    options = {"batch": batch, "training": TRAINING | {"max_steps": 6}}
    one = make_run(tiny_base, tmp_path / "one", "full", micro_batch=batch, **options)
    two = make_run(tiny_base, tmp_path / "two", "full", micro_batch=micro_batch, processes=2, **options)
    for run in (one, two):
        run_ranks(train_here, run.accelerate.num_processes, run)
    _assert_same_curve(_metrics(two), _metrics(one), additions_to_a_step(one), "two ranks")
