"""What is refused about a base by its small files, in `prepare` and before processes start."""

import json

import pytest

from fitune.config.base_model import check_base_model, check_vocabulary
from fitune.config.schema import Data
from fitune.data.prepare import prepare
from fitune.errors import UsageError
from fitune.launching.preflight import check_before_training


def base(folder, added=(), **config):
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


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "compressed-tensors"])
def test_quantised_bases_are_refused(tmp_path, method):
    folder = base(tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(UsageError, match=f"quantised by {method}; fitune trains bf16, fp16, fp32"):
        check_base_model(folder)


def test_bitsandbytes_4_bits_are_not(tmp_path):
    check_base_model(base(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))
    with pytest.raises(UsageError, match="quantised by bitsandbytes"):
        check_base_model(base(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}))


@pytest.mark.parametrize(
    "config", [{"model_type": "gemma2"}, {"vocab_size": 1}, {"quantization_config": {"quant_method": "awq"}}]
)
def test_before_processes_start(make_run, tmp_path, config):
    run = make_run(base(tmp_path / "base", **config), tmp_path / "run", "lora")
    with pytest.raises(UsageError, match=r"gemma2 model|has id 1, but|quantised by awq"):
        check_before_training(run, force=True)
