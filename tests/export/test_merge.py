"""What merge writes: the weights PEFT computes, files that other tools read, nothing where it fails half way."""

import errno
import json
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from adapters import ATTENTION, IDS, TOKENS, logits, refused, set_values, truncate_shard
from bases import base_like, make_adapter
from bitsandbytes.functional import quantize_4bit
from peft import PeftModel
from rounding import additions_to_logits, assert_equal_but_for_rounding, distance
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fitune.errors import FituneError, UsageError
from fitune.export.adapter import AdapterFile
from fitune.export.merge import merge_adapter, merge_full
from fitune.weights import base_weights
from fitune.weights.base_identity import BASE_RECORD
from fitune.weights.safetensors_files import Checkpoint, CheckpointWriter

VARIANTS = {
    "plain": {},
    "attention only": {"target_modules": ATTENTION},
    "rslora": {"use_rslora": True},
    "pattern of half a name": {"rank_pattern": {"proj": 2}},
    "patterns": {"rank_pattern": {"down_proj": 2, r"layers\.0.*q_proj": 3}, "alpha_pattern": {"self_attn.k_proj": 32}},
    "head": {"target_modules": [*ATTENTION, "lm_head"]},
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True, "target_modules": ATTENTION},
    "embedding": {"target_modules": [*ATTENTION, "embed_tokens"]},
    "whole head": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "whole embedding, head and norm": {
        "target_modules": ["up_proj"],
        "modules_to_save": ["embed_tokens", "lm_head", "norm"],
    },
    "whole module of several linears": {"target_modules": ATTENTION, "modules_to_save": ["mlp"]},
    "token list": {"trainable_token_indices": TOKENS},
    "token table": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [3]}},
}


def to_logits(folder) -> int:
    """Additions to a logit; 5 more in each of a layer's seven products: a rank of 4, and what it adds to."""
    config = AutoConfig.from_pretrained(folder)
    return additions_to_logits(config, IDS.shape[1]) + 5 * 7 * config.num_hidden_layers


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_merging_in_fp32_is_what_peft_computes(base, tmp_path, options):
    """No rounding of the merged weights: only the order of fp32 additions differs."""
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    merge_adapter(base, adapter, tmp_path / "out", dtype=torch.float32, progress=False)
    assert_equal_but_for_rounding(logits(tmp_path / "out"), logits(base, adapter), to_logits(base))


@pytest.fixture(scope="module")
def tied_base(base, tmp_path_factory):
    """The base with its embedding for a head, as in Llama 3.2 1B and 3B: the files hold one tensor for both."""
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("tied") / "base"))
    with Checkpoint(base) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors if name != "lm_head.weight"}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_values(folder / "config.json", tie_word_embeddings=True)
    return folder


@pytest.mark.parametrize(
    ("options", "is_tied"),
    [
        ({"target_modules": ATTENTION}, True),
        ({"target_modules": [*ATTENTION, "lm_head"]}, False),
        ({"target_modules": [*ATTENTION, "embed_tokens"]}, False),
        ({"target_modules": ATTENTION, "trainable_token_indices": TOKENS}, True),
    ],
    ids=["neither", "head", "embedding", "rows of both"],
)
def test_a_head_that_is_the_embedding_becomes_its_own_where_only_one_is_changed(tied_base, tmp_path, options, is_tied):
    adapter = make_adapter(tied_base, tmp_path / "adapter", **options)
    out = merge_adapter(tied_base, adapter, tmp_path / "out", dtype=torch.float32, progress=False)
    assert_equal_but_for_rounding(logits(out), logits(tied_base, adapter), to_logits(tied_base))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is is_tied
    with Checkpoint(out) as checkpoint:
        assert ("lm_head.weight" in checkpoint) is not is_tied


@pytest.mark.parametrize("trained", ["all", "lora_only"])
def test_trained_biases_become_the_merged_models(base, tmp_path, trained):
    """The written files are checked too: rounding must explain what they differ by."""
    own = base_like(base, tmp_path / "base", model_type="qwen2")
    adapter = make_adapter(own, tmp_path / "adapter", bias=trained, target_modules=["q_proj", "up_proj"])
    with AdapterFile(adapter) as checkpoint:
        assert sum(name.endswith("bias") for name in checkpoint.tensors) == 2 * (3 if trained == "all" else 1)
    merge_adapter(own, adapter, tmp_path / "out", dtype=torch.float32, progress=False)
    assert_equal_but_for_rounding(logits(tmp_path / "out"), logits(own, adapter), to_logits(own))
    with Checkpoint(own) as before, Checkpoint(tmp_path / "out") as merged:
        biases = [name for name in merged.tensors if name.endswith("bias")]
        changed = [name for name in biases if not torch.equal(merged.read(name), before.read(name).float())]
    assert len(biases) == 6 and len(changed) == (6 if trained == "all" else 2)


def test_an_adapter_that_would_train_biases_of_a_base_without_any_is_plain(base, tmp_path):
    out = merge_adapter(base, make_adapter(base, tmp_path / "a", bias="all"), tmp_path / "out", progress=False)
    assert torch.equal(logits(out), logits(merge_adapter(base, make_adapter(base, tmp_path / "b"), tmp_path / "same")))


def test_merged_bf16_logits_equal_adapter_on_bf16_base(base, adapter, tmp_path):
    """Each merged weight is rounded to bf16 once, by 2^-9 of itself in the mean.

    Ten products in a row, eight in 2 layers, the embedding and the head: 2^-9 * sqrt(10) = 0.6 % in the logits.
    """
    merge_adapter(base, adapter, tmp_path / "out", progress=False)
    expected = logits(base, adapter)
    assert distance(logits(tmp_path / "out"), expected) < 0.01
    assert distance(logits(base), expected) > 0.3


def test_result_loads_with_plain_transformers_and_generates(base, adapter, tmp_path):
    out = merge_adapter(base, adapter, tmp_path / "out", progress=False, max_shard_bytes=400_000)
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    assert model.dtype == torch.bfloat16
    assert len(list(out.glob("model-*.safetensors"))) > 1
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]


def test_nf4_base_equals_peft_on_the_quantised_model(nf4_base, adapter, tmp_path):
    config = json.loads((nf4_base / "config.json").read_text())
    assert config["quantization_config"]["load_in_4bit"]
    out = merge_adapter(nf4_base, adapter, tmp_path / "out", dtype=torch.float32, progress=False)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    with Checkpoint(out) as checkpoint:
        assert {info.dtype for info in checkpoint.tensors.values()} == {torch.float32}
        assert not any("absmax" in name or "quant" in name for name in checkpoint.tensors)
    plain = AutoModelForCausalLM.from_pretrained(nf4_base, dtype=torch.float32).dequantize().float()
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain, adapter).eval()(IDS).logits
    assert_equal_but_for_rounding(logits(out), expected, to_logits(nf4_base))


@pytest.mark.parametrize("shape", [(24, 40), (5, 96), (3, 33)], ids=str)
def test_nf4_rows_that_are_not_whole_blocks_are_dequantised(shape, tmp_path):
    """As the format says: the code's value times its block's absmax, rounded to bf16. No sum, so equal to the bit."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes would compile for half a minute
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    parts = {"w": packed} | {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(parts, tmp_path / "model.safetensors")
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)[: weight.numel()]
    expected = state.code[codes.long()] * state.absmax.repeat_interleave(64)[: weight.numel()]
    with Checkpoint(tmp_path) as checkpoint:
        found = base_weights.BaseWeights(checkpoint).rows("w", 0, shape[0])
    assert torch.equal(found, expected.view(shape).bfloat16())


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_row_chunks_do_not_change_the_result(base, nf4_base, adapter, tmp_path, monkeypatch, kind):
    """Up to the order of fp32 additions in a matrix product of other height: over a rank of 4, and to the base."""
    source = base if kind == "bf16" else nf4_base
    whole = merge_adapter(source, adapter, tmp_path / "whole", dtype=torch.float32, progress=False)
    monkeypatch.setattr(base_weights, "CHUNK_WEIGHTS", 1000)
    with Checkpoint(source) as checkpoint:
        assert len(base_weights.BaseWeights(checkpoint).row_chunks("model.layers.0.mlp.down_proj.weight")) > 10
    pieces = merge_adapter(source, adapter, tmp_path / "pieces", dtype=torch.float32, progress=False)
    with Checkpoint(whole) as one, Checkpoint(pieces) as other:
        for name in one.tensors:
            assert_equal_but_for_rounding(other.read(name), one.read(name), roundings=4 + 1, of=name)


def test_config_and_tokenizer_come_from_the_right_folder(own_base, own_adapter, tmp_path):
    set_values(own_base / "config.json", use_cache=False, torch_dtype="float16", _name_or_path="elsewhere")
    (own_base / "LICENSE").write_text("the base's licence")
    tokenizer = AutoTokenizer.from_pretrained(own_base)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(own_adapter)
    out = merge_adapter(own_base, own_adapter, tmp_path / "out", progress=False)
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"], config["use_cache"]) == ("bfloat16", "bfloat16", True)
    assert "_name_or_path" not in config
    assert (out / "LICENSE").read_text() == "the base's licence"
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert not list(out.glob("adapter*")) and not (out / BASE_RECORD).exists()


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("of", ["adapter", "base"])
def test_templates_by_name_are_kept(of, beside, own_base, own_adapter, tmp_path):
    """In tokenizer_config.json, as they were written before, or in a folder of their own. An adapter's become one."""
    named = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools | length }}{{ messages[0].content }}"}
    tokenizer = AutoTokenizer.from_pretrained(own_base)
    (own_base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.chat_template = named
    owner = own_adapter if of == "adapter" else own_base
    tokenizer.save_pretrained(owner)
    if not beside:
        shutil.rmtree(owner / "additional_chat_templates")
        (owner / "chat_template.jinja").unlink()
        file = owner / "tokenizer_config.json"
        listed = [{"name": name, "template": text} for name, text in named.items()]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": listed}))
    merged = AutoTokenizer.from_pretrained(merge_adapter(own_base, own_adapter, tmp_path / "out", progress=False))
    asked = [{"role": "user", "content": "Hi"}]
    found = [merged.apply_chat_template(asked, tools=tools, tokenize=False) for tools in (None, [{}, {}])]
    assert found == ["Hi", "2Hi"]


@pytest.mark.parametrize("in_adapter", [False, True])
def test_the_chat_template_is_the_adapters_or_else_the_bases(in_adapter, own_base, own_adapter, tmp_path):
    """An adapter from elsewhere may bring a template without a tokenizer, or neither."""
    (own_base / "chat_template.jinja").write_text("base {{ messages[0]['content'] }}")
    if in_adapter:
        (own_adapter / "chat_template.jinja").write_text("adapter {{ messages[0]['content'] }}")
    out = merge_adapter(own_base, own_adapter, tmp_path / "out", progress=False, check=False)
    text = AutoTokenizer.from_pretrained(out).apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == ("adapter Hi" if in_adapter else "base Hi")


def test_an_adapter_without_a_vocabulary_gets_the_bases_tokenizer(own_base, own_adapter, tmp_path):
    """Of tokenizer_config.json alone transformers makes a tokenizer that knows no word, without a complaint."""
    tokenizer = AutoTokenizer.from_pretrained(own_base)
    tokenizer.save_pretrained(own_adapter)
    (own_adapter / "tokenizer.json").unlink()
    out = merge_adapter(own_base, own_adapter, tmp_path / "out", progress=False, check=False)
    assert AutoTokenizer.from_pretrained(out)("River stone")["input_ids"] == tokenizer("River stone")["input_ids"]


@pytest.mark.parametrize(
    "in_base, in_adapter, expected",
    [
        (2038, None, [2038, 2046]),
        ([2038, 7], None, [2038, 7, 2046]),
        (2038, [2046, 5], [2038, 2046, 5]),
        (None, None, [2038, 2046]),
    ],
)
def test_stop_tokens(own_base, own_adapter, tmp_path, in_base, in_adapter, expected):
    """The base's and the adapter's, else config.json's; the template's <|eot_id|> (2046) is always among them."""
    (own_base / "generation_config.json").unlink()
    for folder, stop in ((own_base, in_base), (own_adapter, in_adapter)):
        if stop is not None:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop, "top_p": 0.9}))
    out = merge_adapter(own_base, own_adapter, tmp_path / "out", progress=False)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == expected


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_failure_half_way_leaves_nothing(base, adapter, tmp_path, monkeypatch, failure):
    write, calls = CheckpointWriter.write, []

    def failing_write(self, name, tensor):
        calls.append(name)
        if len(calls) == 5:
            assert list(tmp_path.glob(".out.partial-*/*.safetensors"))
            raise failure
        write(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "write", failing_write)
    kind = FituneError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(kind):
        merge_adapter(base, adapter, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_and_untouched(base, adapter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UsageError, match="exists already"):
        merge_adapter(base, adapter, out, progress=False)
    assert list(out.iterdir()) == []
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists already"):
        merge_adapter(base, adapter, dangling, progress=False)


def test_disk_space_is_checked_first(base, adapter, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**20))
    refused(r"needs 0\.1 GiB, .* has 0\.0 GiB free", base, adapter, tmp_path / "new" / "out", kind=FituneError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_modes_follow_the_umask(base, adapter, tmp_path, umask):
    before = os.umask(umask)
    try:
        out = merge_adapter(base, adapter, tmp_path / "out", progress=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o666 & ~umask}


def test_full_is_copied_whole(own_base, tmp_path):
    (own_base / "optimizer.pt").write_text("not part of a model")
    out = merge_full(own_base, tmp_path / "out", progress=False)
    assert torch.equal(logits(out), logits(own_base))  # the same bytes through the same code
    expected = {file.name for file in own_base.iterdir()} - {"optimizer.pt"}
    assert {file.name for file in out.iterdir()} == expected
    with pytest.raises(UsageError, match="exists already"):
        merge_full(own_base, out, progress=False)
    truncate_shard(own_base)
    with pytest.raises(FituneError, match="truncated"):
        merge_full(own_base, tmp_path / "again", progress=False)
    assert not (tmp_path / "again").exists()
