import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import quick_python
import torch
from patience import PATIENCE_SECONDS
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fitune.demo.tiny_base import DEMO_BASE, TEXTS, build_tiny_base, make_demo_base
from fitune.errors import UsageError
from fitune.weights.safetensors_files import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
CONVERSATION = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Green."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_command_in_another_process_gives_the_same_bytes(folder, tmp_path):
    """With another seed of Python's hashes."""
    command = [sys.executable, "-m", "fitune.demo.tiny_base", str(tmp_path / "again")]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert _digests(tmp_path / "again") == _digests(folder)


def test_command_refuses_an_existing_folder_in_one_line(tmp_path):
    (tmp_path / "mine").mkdir()
    words = ["-m", "fitune.demo.tiny_base", tmp_path / "mine"]
    done = quick_python.run(words, dict(os.environ), ROOT, PATIENCE_SECONDS)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "exists already" in done.stderr
    assert list((tmp_path / "mine").iterdir()) == []


def test_another_seed_changes_the_weights_only(folder, tmp_path):
    other = _digests(build_tiny_base(tmp_path / "other", seed=1))
    changed = {name for name, digest in _digests(folder).items() if other[name] != digest}
    assert changed == {"model.safetensors"}


def test_architecture_is_llama_3(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert isinstance(model, LlamaForCausalLM)
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert config.max_position_embeddings == 8192
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    with Checkpoint(folder) as checkpoint:
        assert {info.dtype for info in checkpoint.tensors.values()} == {torch.bfloat16}
        assert "lm_head.weight" in checkpoint


def test_untrained_model_knows_nothing_and_is_finite(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [json.loads(line)["messages"] for line in TEXTS.read_text(encoding="utf-8").splitlines()[:20]]
    losses = []
    for messages in rows:
        ids = torch.tensor([tokenizer.apply_chat_template(messages)["input_ids"][:256]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    # logits of variance 1 cost half a nat on top of a uniform guess
    assert sum(losses) / len(losses) == pytest.approx(math.log(2048) + 0.5, abs=0.2)


def test_special_tokens_have_their_roles(tokenizer):
    assert len(tokenizer) == 2048
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    for token in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
        ids = tokenizer(f"a{token}b", add_special_tokens=False).input_ids
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_exactly_one_bos(tokenizer):
    assert tokenizer("Hello.").input_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer("Hello.", add_special_tokens=False).input_ids.count(tokenizer.bos_token_id) == 0
    conversation = tokenizer.apply_chat_template(CONVERSATION)["input_ids"]
    assert conversation.count(tokenizer.bos_token_id) == 1
    assert conversation.count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) == len(CONVERSATION)


@pytest.mark.parametrize("text", ["plain words", "çédille, 東京 🙂\tand\r\n\n  spaces  ", "1234567 it's"])
def test_text_survives_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_numbers_are_cut_after_three_digits_as_in_llama_3(tokenizer):
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345 words")
    assert [piece for piece, _ in pieces] == ["it", "'s", "Ġ", "123", "45", "Ġwords"]


def test_generation_stops_at_end_of_text_and_of_turn(folder, tokenizer):
    stop = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(stop) == ["<|end_of_text|>", "<|eot_id|>"]


def test_own_texts_and_shards(tmp_path):
    folder = build_tiny_base(
        tmp_path / "small",
        texts=["few words"],
        vocab_size=300,
        num_layers=2,
        dtype=torch.float16,
        max_shard_bytes=10**5,
    )
    assert len(AutoTokenizer.from_pretrained(folder)) == 300
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float16
    assert model.lm_head.weight.shape == (300, 128)


@pytest.mark.parametrize(
    "sizes", [{"vocab_size": 100}, {"hidden_size": 100}, {"num_heads": 8, "num_kv_heads": 3}], ids=str
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, sizes):
    with pytest.raises(UsageError, match=next(reversed(sizes)).replace("num_kv_heads", "num_heads 8")):
        build_tiny_base(tmp_path / "bad", **sizes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("own", "sets", "made"),
    [
        ("extends: tiny_qlora\n", (), True),
        ("extends: tiny_qlora\nbase: {model: org/another}\n", (), False),
        ("extends: tiny_qlora\n", ("base.model=./elsewhere",), False),
        ("extends: llama3_8b_qlora\n", (), False),
    ],
    ids=["extends", "another base", "another base typed", "extends another"],
)
def test_a_recipe_that_extends_a_tiny_one_gets_its_base(tmp_path, monkeypatch, capsys, own, sets, made):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(own)
    make_demo_base("mine.yaml", sets)
    assert (DEMO_BASE / "tokenizer.json").is_file() == made
    assert ("models/tiny-base: made, the tiny Llama base model of mine.yaml" in capsys.readouterr().err) == made
    make_demo_base("mine.yaml", sets)  # one that is there stays
    assert not capsys.readouterr().err
