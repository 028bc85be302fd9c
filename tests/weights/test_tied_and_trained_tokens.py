"""A head that is the embedding, and rows of both that are trained."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from loading import damaged_copy
from ranks import run_ranks, sharded_model, whole
from rounding import additions_to_logits, assert_equal_but_for_rounding
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaForCausalLM

from fitune.config.stored_weights import EMBEDDING, HEAD
from fitune.data.dataset import load_tokenizer
from fitune.errors import UsageError
from fitune.model.skeleton import build_skeleton
from fitune.training.distributed import join
from fitune.training.train import load_sharded_model
from fitune.weights.safetensors_files import Checkpoint

TRAINED = ["<|eot_id|>", "<|start_header_id|>"]


def _logits_and_tokens(runs: dict, tokens) -> dict:
    report = {}
    for case, run in runs.items():
        model, tokenizer = sharded_model(run)
        ids = tokenizer.convert_tokens_to_ids(TRAINED)
        deltas = {n: p for n, p in model.named_parameters() if "trainable_tokens_delta" in n}
        report[case] = {"logits": model(tokens).logits.detach(), "ids": ids}
        if deltas:
            report[case]["start"] = {_layer_of(n): whole(delta).detach().clone() for n, delta in deltas.items()}
            model.apply(lambda module: module.reshard() if isinstance(module, FSDPModule) else None)
            for delta in deltas.values():
                delta.data.mul_(-1)
            report[case]["changed"] = model(tokens).logits.detach()
    return report


def _layer_of(delta: str) -> str:
    return "lm_head" if "lm_head" in delta else "model.embed_tokens"


def test_tied_embeddings_and_trained_tokens(tied_base, uneven_base, make_run, tmp_path):
    tokens = torch.arange(425, 435).view(5, 2)
    for world_size in (1, 3):
        options = {"processes": world_size}
        runs = {
            "tied": make_run(tied_base, tmp_path, "lora", **options),
            "tokens": make_run(uneven_base, tmp_path, "lora", lora={"trainable_tokens": TRAINED}, **options),
        }
        for report in run_ranks(_logits_and_tokens, world_size, runs, tokens):
            tied = LlamaForCausalLM.from_pretrained(tied_base, dtype=torch.float32)
            assert tied.lm_head.weight is tied.model.embed_tokens.weight
            additions = additions_to_logits(tied.config, tokens.shape[1])
            assert_equal_but_for_rounding(report["tied"]["logits"], tied(tokens).logits, additions, of="tied")

            plain = LlamaForCausalLM.from_pretrained(uneven_base, dtype=torch.float32)
            found = report["tokens"]
            assert set(found["ids"]) <= set(tokens.view(-1).tolist())
            assert set(found["start"]) == {"model.embed_tokens", "lm_head"}
            for name, rows in found["start"].items():
                assert torch.equal(rows, plain.get_submodule(name).weight[found["ids"]])
            assert_equal_but_for_rounding(found["logits"], plain(tokens).logits, additions, of="trained tokens")
            with torch.no_grad():
                for name in found["start"]:
                    plain.get_submodule(name).weight[found["ids"]] *= -1
            assert_equal_but_for_rounding(found["changed"], plain(tokens).logits, additions, of="changed tokens")


def test_training_rows_of_tied_embeddings_is_refused(tied_base, make_run, tmp_path):
    run = make_run(tied_base, tmp_path, "lora", lora={"trainable_tokens": TRAINED})
    with pytest.raises(UsageError, match="tie_word_embeddings"):
        build_skeleton(run.recipe, tied_base, load_tokenizer(run.recipe, tied_base), torch.float32, "cpu")


def _load(run) -> dict:
    model, _ = sharded_model(run)
    return {name: whole(parameter).detach().clone() for name, parameter in model.named_parameters()}


def _bytes_told(run) -> int:
    mesh, base, told = join(run), Path(run.recipe.base.model), []

    @contextmanager
    def bar(title, total, **options):
        yield told.append

    load_sharded_model(run, base, load_tokenizer(run.recipe, base), mesh, bar=bar)
    return sum(told)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_tensor_that_fills_embedding_and_head_is_told_once(tied_base, make_run, tmp_path, method):
    """So that the bar ends at what the files hold."""
    with Checkpoint(tied_base) as checkpoint:
        assert run_ranks(_bytes_told, 1, make_run(tied_base, tmp_path, method)) == [checkpoint.nbytes]


def test_a_tied_model_may_store_its_head_too(tied_base, make_run, tmp_path):
    """As older files do. Another head than the embedding is not what config.json says."""
    same = damaged_copy(tied_base, tmp_path / "same", lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    [expected], [found] = (run_ranks(_load, 1, make_run(base, tmp_path, "full")) for base in (tied_base, same))
    assert HEAD not in expected and set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = damaged_copy(tied_base, tmp_path / "other", lambda t: t.update({HEAD: t[EMBEDDING] * 2}))
    with pytest.raises(RuntimeError, match="set tie_word_embeddings to false"):
        run_ranks(_load, 1, make_run(other, tmp_path, "full"))
