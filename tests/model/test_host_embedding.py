"""A frozen embedding in host RAM: its weight stays there, and training has the same bits as with it on the GPU."""

import json
import shutil

import pytest
import torch
from ranks import run_alone, run_ranks, sharded_model, train_here
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from fitune.model import host_embedding as host_module
from fitune.model.host_embedding import HostEmbedding, host_embedding
from fitune.model.sharding import fsdp_parameters, local_part
from fitune.model.skeleton import decoder
from fitune.training.evaluate import evaluate

TOKENS = torch.randint(0, 509, (2, 19), generator=torch.Generator().manual_seed(0))
TRAINED = {"trainable_tokens": ["<|eot_id|>", "<|start_header_id|>"]}


def _places(run) -> tuple[bool, bool, bool]:
    """Whether rows are looked up in the stored weight, are the right ones, and the weight has a copy."""
    model, _ = sharded_model(run)
    embedding = host_embedding(model)
    stored, seen = local_part(embedding.weight), []
    embedding.register_forward_pre_hook(lambda module, ids: seen.append(module.weight.data_ptr()))
    embedding.register_forward_hook(lambda module, ids, rows: seen.append(rows))
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    used, rows = seen
    copied = bool(fsdp_parameters(model)[embedding, "weight"].all_gather_outputs)
    right = torch.equal(rows, nn.functional.embedding(TOKENS, stored))
    return used == stored.data_ptr(), right, copied


@pytest.mark.parametrize("where", [{"offload_params": True}, {"embedding_offload": True}])
@pytest.mark.parametrize("lora", [None, TRAINED])
def test_rows_are_looked_up_where_the_weight_is_stored(where, lora, uneven_base, make_run, tmp_path):
    assert run_alone(_places, make_run(uneven_base, tmp_path, "qlora", lora=lora, **where)) == (True, True, False)


def _kinds(run) -> set[type]:
    model, _ = sharded_model(run)
    return {type(m).__name__ for m in decoder(model).model.embed_tokens.modules() if isinstance(m, nn.Embedding)}


def test_other_embeddings_are_gathered_as_before(tiny_base, make_run, tmp_path):
    """Of several ranks each has a part of the rows, of method full all rows are trained, and some lie on the GPU."""
    kinds = [
        *run_ranks(_kinds, 2, make_run(tiny_base, tmp_path, "lora", processes=2, embedding_offload=True)),
        run_alone(_kinds, make_run(tiny_base, tmp_path, "full", offload_params=True)),
        run_alone(_kinds, make_run(tiny_base, tmp_path, "lora")),
    ]
    assert not any("HostEmbedding" in name for found in kinds for name in found)


def _train_knowing_the_ids(run) -> list[bool]:
    """Trains; of each pass of training whether its ids were known on the CPU: else Python would wait for the GPU."""
    forward, known = HostEmbedding.forward, []

    def watched(self, ids):
        if self.training:
            known.append(self._in_host_ram is not None)
        return forward(self, ids)

    HostEmbedding.forward = watched
    train_here(run)
    return known


CASES = {
    "packed, dropout, trained tokens": ("qlora", True, {"dropout": 0.2, **TRAINED}, {}, {"offload_params": True}),
    "packed, noise": ("lora", True, None, {"neftune_noise_alpha": 5.0}, {"embedding_offload": True}),
    "padded": ("qlora", False, None, {}, {"offload_params": True}),
}


def _numbers(run) -> list[dict]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    kept = ("step", "loss", "grad_norm", "eval_loss", "eval_token_accuracy")
    return [{key: line[key] for key in kept if key in line} for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_the_same_training_to_the_bit_without_waiting_for_ids(case, uneven_base, make_run, tmp_path):
    """Two passes a step, evaluations between the steps; resumed from the middle; the result evaluated."""
    method, packing, lora, extra, where = CASES[case]
    training = {"max_steps": 4, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 2} | extra
    training |= {"save_strategy": "steps", "save_steps": 2}
    options = {"batch": 4, "micro_batch": 2, "packing": packing, "max_length": 112, "lora": lora, "training": training}
    run = make_run(uneven_base, tmp_path / "run", method, **options, **where)
    assert run_ranks(_train_knowing_the_ids, 1, run) == [[True] * 8]
    resumed = run.model_copy(update={"output_dir": str(tmp_path / "resumed"), "resume": True})
    shutil.copytree(run.folder, resumed.folder, ignore=shutil.ignore_patterns("checkpoint-4"))
    shutil.rmtree(resumed.result_folder)
    assert run_ranks(_train_knowing_the_ids, 1, resumed) == [[True] * 4]
    on_gpu = make_run(uneven_base, tmp_path / "on_gpu", method, **options)
    run_ranks(train_here, 1, on_gpu)

    for one in (run, resumed, on_gpu):
        run_ranks(evaluate, 1, one)
    expected = load_file(on_gpu.result_folder / "adapter_model.safetensors")
    for one in (run, resumed):
        assert _numbers(one) == _numbers(on_gpu)
        assert (one.folder / "eval.json").read_text() == (on_gpu.folder / "eval.json").read_text()
        found = load_file(one.result_folder / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_rows_of_a_long_prompt_are_in_host_ram_few_at_a_time(monkeypatch):
    """Where a model is asked: 16 prompts of 4,096 tokens had 1 GiB of them at 70B, page-locked."""
    ids, weight = torch.arange(22).view(2, 11) % 7, torch.randn(7, 4)
    embedding, at_once, lookup = HostEmbedding.from_pretrained(weight), [], F.embedding
    monkeypatch.setattr(host_module, "AT_ONCE", 5)
    monkeypatch.setattr(F, "embedding", lambda some, rows: at_once.append(len(some)) or lookup(some, rows))
    assert torch.equal(embedding(ids), weight[ids])
    assert at_once == [5, 5, 5, 5, 2]
    embedding.expect(ids)
    assert torch.equal(embedding(ids), weight[ids]) and len(at_once) == 5
