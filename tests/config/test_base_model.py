"""What is refused about a base by its small files, in `prepare` and before processes start."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fitune.config.base_model import check_base_model, check_vocabulary
from fitune.config.recipe import Data
from fitune.data.prepare import prepare
from fitune.errors import UsageError
from fitune.launching.preflight import check_before_training

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def base(folder, added=(), **config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 3} | config))
    tokens = [{"id": number, "content": token} for number, token in added]
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": tokens}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_fewer_tokens_than_rows_are_usual(tmp_path):
    check_base_model(base(tmp_path))
    check_base_model(base(tmp_path, [(2, "<end>")]))


def test_more_tokens_than_rows_are_refused_by_name(tmp_path):
    folder = base(tmp_path, [(2, "<end>"), (3, "<pad>"), (4, "<x>")])
    with pytest.raises(UsageError, match="token '<pad>' has id 3 and 1 more, but the model has rows for ids below 3"):
        check_vocabulary(folder)
    with pytest.raises(UsageError, match="token '<pad>' has id 3"):
        prepare(Data(dataset="none", prepared="none"), tmp_path / "out", tokenizer=str(folder))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (
            "tokenizer.json",
            {"model": {"type": "Unigram", "vocab": [["a", 0], ["b", -1], ["c", -2], ["d", -3]]}},
        ),
        ("vocab.json", {"a": 0, "d": 3}),
        ("added_tokens.json", {"d": 3}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": "d"}}}),
    ],
)
def test_tokens_are_looked_for_in_each_file_of_a_tokenizer(tmp_path, file, content):
    folder = base(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UsageError, match="token 'd' has id 3, but the model has rows for ids below 3"):
        check_vocabulary(folder)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "compressed-tensors"])
def test_quantised_bases_are_refused(tmp_path, method):
    folder = base(tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(UsageError, match=f"quantised by {method}; fitune reads bf16, fp16, fp32"):
        check_base_model(folder)


def test_bitsandbytes_4_bits_are_not(tmp_path):
    check_base_model(base(tmp_path, quantization_config=NF4))
    with pytest.raises(UsageError, match="quantised by bitsandbytes"):
        check_base_model(base(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"a_proj.weight": torch.zeros(2, dtype=torch.float8_e4m3fn)},
            r"tensor a_proj.weight \(F8_E4M3\) is quantised",
        ),
        ({"a_proj.qweight": torch.zeros(2, dtype=torch.int32)}, r"tensor a_proj.qweight \(I32\) is quantised"),
        ({"a_proj.weight_packed": torch.zeros(2, dtype=torch.int32)}, "tensor a_proj.weight_packed .* is quantised"),
        ({"a_proj.SCB": torch.zeros(2)}, "tensor a_proj.SCB .* is quantised"),
        (
            {"model.embed_tokens.weight": torch.zeros(2)},
            "its weights have no lm_head.weight, and config.json does not say",
        ),
    ],
)
@pytest.mark.parametrize("in_index", [False, True])
def test_what_only_the_weights_say_is_refused_before_processes_start(tensors, said, in_index, make_run, tmp_path):
    """Old GPTQ and AWQ models, ModelOpt's, and heads that were left out: config.json says nothing of them."""
    folder = base(tmp_path / "base")
    name = "model-00001-of-00001.safetensors" if in_index else "model.safetensors"
    save_file(tensors, folder / name)
    if in_index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    with pytest.raises(UsageError, match=said):
        check_before_training(make_run(folder, tmp_path / "run", "lora"), force=True)


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_small_files_beside_the_weights_say_that_they_are_quantised(file, tmp_path):
    folder = base(tmp_path)
    (folder / file).write_text("{}")
    with pytest.raises(UsageError, match=f"{file}: weights that are quantised by .*; fitune reads bf16, fp16, fp32"):
        check_base_model(folder)


def test_weights_that_are_read_are_not_refused(tmp_path):
    """A head of its own, a head that is the embedding, none yet, a damaged file: that one is named by its reader."""
    weights = {"model.embed_tokens.weight": torch.zeros(2), "model.layers.0.mlp.up_proj.weight": torch.zeros(2)}
    folder = base(tmp_path / "own")
    save_file(weights | {"lm_head.weight": torch.zeros(2)}, folder / "model.safetensors")
    check_base_model(folder)
    folder = base(tmp_path / "tied", tie_word_embeddings=True)
    save_file(weights, folder / "model.safetensors")
    check_base_model(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    check_base_model(folder)


QWEN = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128, "num_hidden_layers": 2}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}


@pytest.mark.parametrize(
    ("config", "method", "said"),
    [
        ({"model_type": "gemma2"}, "lora", "a gemma2 model; fitune trains these only: Llama"),
        ({"hidden_act": "gelu"}, "lora", "hidden_act is 'gelu'"),
        (
            {"attention_dropout": 0.1},
            "full",
            "attention_dropout is 0.1, with which fitune does not train; set it to 0.0",
        ),
        ({"vocab_size": 1}, "lora", "has id 1, but"),
        ({"quantization_config": {"quant_method": "awq"}}, "lora", "quantised by awq"),
        ({"quantization_config": NF4}, "lora", "its weights are in 4 bits; method lora needs bf16"),
        ({"max_position_embeddings": 128}, "full", "max_length 256 is beyond the 128 positions"),
        ({"model_type": "mistral", "sliding_window": 255}, "full", "beyond the model's sliding window of 255 tokens"),
        (QWEN | {"max_window_layers": 1}, "lora", "beyond the model's sliding window of 128 tokens"),
        (QWEN | {"layer_types": ["sliding_attention"]}, "lora", "beyond the model's sliding window of 128 tokens"),
        ({"tie_word_embeddings": True}, "tokens", "lora.trainable_tokens needs an embedding and a head of their own"),
        (SIZES | {"hidden_size": 96}, "qlora", "hidden_size 96 is no multiple of 64"),
        (SIZES | {"intermediate_size": 100}, "qlora", "intermediate_size 100 is no multiple of 64"),
        (SIZES | {"head_dim": 24}, "qlora", "num_attention_heads x head_dim 96 is no multiple of 64"),
    ],
)
def test_before_processes_start(make_run, tmp_path, config, method, said):
    lora = {"trainable_tokens": ["a"]} if method == "tokens" else None
    folder = base(tmp_path / "base", **config)
    run = make_run(folder, tmp_path / "run", "lora" if lora else method, lora=lora)
    with pytest.raises(UsageError, match=said):
        check_before_training(run, force=True)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral", "sliding_window": 256},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral"},  # transformers takes 4096
        {"model_type": "llama", "sliding_window": 16},  # which transformers' Llama ignores
        QWEN | {"use_sliding_window": False},
        QWEN | {"max_window_layers": 2},
        QWEN | {"model_type": "qwen3", "layer_types": ["full_attention"]},
    ],
)
def test_rows_within_the_window_are_trained(make_run, tmp_path, config):
    run = make_run(base(tmp_path / "base", **config), tmp_path / "run", "full")
    check_base_model(tmp_path / "base", run.recipe)


def test_evaluations_of_no_rows_are_refused_before_processes_start(make_run, prepared, tmp_path):
    """Which rows there are is known before the model is read."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_bytes((prepared / "train.jsonl").read_bytes())
    save_file({}, base(tmp_path / "base") / "model.safetensors")
    with pytest.raises(
        UsageError, match=rf"test\.jsonl: no such file; run: .* prepare RECIPE --output {data} --overwrite$"
    ):
        check_before_training(_on(data, make_run(base(tmp_path / "base"), tmp_path / "run", "lora")), force=True)
    (data / "test.jsonl").touch()
    check_before_training(_on(data, make_run(base(tmp_path / "base"), tmp_path / "run", "lora")), force=True)
    evaluated = make_run(base(tmp_path / "base"), tmp_path / "run", "lora", training={"eval_strategy": "epoch"})
    with pytest.raises(UsageError, match=r"test\.jsonl has no rows, and training\.eval_strategy asks for evaluations"):
        check_before_training(_on(data, evaluated), force=True)


def test_a_folder_without_weights_is_refused_before_processes_start(make_run, tmp_path):
    run = make_run(base(tmp_path / "base"), tmp_path / "run", "lora")
    with pytest.raises(UsageError, match=r"base: \*\.safetensors are missing"):
        check_before_training(run, force=True)


def _on(prepared, run):
    """The run on other rows."""
    data = run.recipe.data.model_copy(update={"prepared": str(prepared)})
    return run.model_copy(update={"recipe": run.recipe.model_copy(update={"data": data})})
