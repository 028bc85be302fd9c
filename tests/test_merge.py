import errno
import json
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fitune import base_weights
from fitune.base_identity import BASE_RECORD, BaseRecord, base_fingerprint, write_base_record
from fitune.checkpoint import INDEX_NAME, Checkpoint, CheckpointWriter
from fitune.errors import FituneError, UsageError
from fitune.merge import merge_adapter, merge_full
from fitune.tiny import build_tiny_base

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"num_layers": 2, "max_shard_bytes": 300_000}
TOKENS = [2043, 2046, 2044]  # not in order: rows follow the list
IDS = torch.tensor([[2037, 5, 77, 2043, 300, 2044, 9, 2046, 1200, 801]])
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base") / "base", **SIZES)


@pytest.fixture(scope="module")
def nf4_base(base, tmp_path_factory):
    """The base as transformers + bitsandbytes save it in 4 bits."""
    folder = tmp_path_factory.mktemp("nf4") / "base"
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def _make_adapter(base: Path, folder: Path, **options) -> Path:
    """An adapter as PEFT saves it, with weights that change every logit."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    model.save_pretrained(folder, save_embedding_layers=False)
    file, generator = folder / "adapter_model.safetensors", torch.Generator().manual_seed(1)
    save_file({n: torch.randn(t.shape, generator=generator) * 0.05 for n, t in load_file(file).items()}, file)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return _make_adapter(base, tmp_path_factory.mktemp("adapter"), trainable_token_indices={"embed_tokens": TOKENS})


@pytest.fixture
def own_adapter(adapter, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(adapter, tmp_path / "own_adapter"))


@pytest.fixture
def own_base(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "own_base"))


def _logits(folder, adapter=None) -> torch.Tensor:
    """By plain transformers and PEFT, in fp32 whatever the stored dtype, so that only stored values differ."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(IDS).logits


def _relative(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def _set(file: Path, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _refused(said, *arguments, kind=UsageError, **options):
    with pytest.raises(kind, match=said) as caught:
        merge_adapter(*arguments, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert not list(arguments[2].parent.glob(f"*{arguments[2].name}*"))


VARIANTS = {
    "plain": {},
    "attention only": {"target_modules": ATTENTION},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2, r"layers\.0.*q_proj": 3}, "alpha_pattern": {"self_attn.k_proj": 32}},
    "head": {"target_modules": [*ATTENTION, "lm_head"]},
    "token list": {"trainable_token_indices": TOKENS},
    "token table": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [3]}},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_merging_in_fp32_is_what_peft_computes(base, tmp_path, options):
    """No rounding of the merged weights: only the order of fp32 additions differs."""
    adapter = _make_adapter(base, tmp_path / "adapter", **options)
    merge_adapter(base, adapter, tmp_path / "out", dtype=torch.float32, progress=False)
    assert _relative(_logits(tmp_path / "out"), _logits(base, adapter)) < 1e-5


def test_merged_bf16_logits_equal_adapter_on_bf16_base(base, adapter, tmp_path):
    """Each merged weight is rounded to bf16 once, by up to 2^-9 of itself: below 1 % in the logits of 2 layers."""
    merge_adapter(base, adapter, tmp_path / "out", progress=False)
    expected = _logits(base, adapter)
    assert _relative(_logits(tmp_path / "out"), expected) < 0.01
    assert _relative(_logits(base), expected) > 0.3


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
    assert _relative(_logits(out), expected) < 1e-5


@pytest.mark.parametrize("shape", [(24, 40), (5, 96), (3, 33)], ids=str)
def test_nf4_rows_that_are_not_whole_blocks_are_dequantised(shape, tmp_path):
    """As the format says: the code's value times its block's absmax, in bf16."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
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
    """Up to the order of fp32 additions in a matrix product of other height."""
    source = base if kind == "bf16" else nf4_base
    whole = merge_adapter(source, adapter, tmp_path / "whole", dtype=torch.float32, progress=False)
    monkeypatch.setattr(base_weights, "CHUNK_WEIGHTS", 1000)
    with Checkpoint(source) as checkpoint:
        assert len(base_weights.BaseWeights(checkpoint).row_chunks("model.layers.0.mlp.down_proj.weight")) > 10
    pieces = merge_adapter(source, adapter, tmp_path / "pieces", dtype=torch.float32, progress=False)
    with Checkpoint(whole) as one, Checkpoint(pieces) as other:
        for name in one.tensors:
            torch.testing.assert_close(other.read(name), one.read(name), rtol=1e-5, atol=1e-7)


def test_config_and_tokenizer_come_from_the_right_folder(own_base, own_adapter, tmp_path):
    _set(own_base / "config.json", use_cache=False, torch_dtype="float16", _name_or_path="elsewhere")
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


@pytest.mark.parametrize(
    "in_base, in_adapter, expected",
    [
        (2038, None, [2038, 2046]),
        ([2038, 7], None, [2038, 7, 2046]),
        (2038, [2046, 5], [2046, 5]),
        (None, None, [2038, 2046]),
    ],
)
def test_stop_tokens(own_base, own_adapter, tmp_path, in_base, in_adapter, expected):
    """The adapter's own, else the base's, else config.json's; the template's <|eot_id|> (2046) is always among them."""
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
    _refused(r"needs 0\.1 GiB, .* has 0\.0 GiB free", base, adapter, tmp_path / "new" / "out", kind=FituneError)
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


def _truncate_shard(folder):
    file = sorted(folder.glob("model-*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size - 1)


def _remove_shard(folder):
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()


def _escape(folder):
    index = folder / INDEX_NAME
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../lm_head.safetensors"
    index.write_text(json.dumps(content))


def _drop_tensor(folder):
    index = folder / INDEX_NAME
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage, said",
    [
        (_truncate_shard, "truncated"),
        (_remove_shard, "no such file"),
        (_escape, r"'\.\./lm_head\.safetensors' leaves the model's folder"),
        (_drop_tensor, r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"),
    ],
)
def test_a_damaged_base_is_refused_before_anything_is_written(own_base, adapter, tmp_path, damage, said):
    damage(own_base)
    _refused(said, own_base, adapter, tmp_path / "out", kind=FituneError)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"a_method_of_tomorrow": {"x": 1}}, "a_method_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"r": 8}, "do not have rank 8"),
        ({"lora_alpha": "much"}, "unusable"),
        ({"trainable_token_indices": None}, "trainable_token_indices does not match"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices does not match"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2, 2048]}}, r"model\.embed_tokens\.weight: .*wrong base"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_applied_exactly_are_refused(base, own_adapter, tmp_path, change, said):
    _set(own_adapter / "adapter_config.json", **change)
    _refused(said, base, own_adapter, tmp_path / "out")


def test_adapter_files_are_named_in_errors(base, own_adapter, tmp_path):
    file = own_adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, file)
    _refused(r"tensor base_model\.model\.lm_head\.weight is neither", base, own_adapter, tmp_path / "out")
    save_file({n: t for n, t in tensors.items() if "layers.0.mlp.up_proj.lora_B" not in n}, file)
    _refused(r"up_proj\.lora_B\.weight is missing", base, own_adapter, tmp_path / "out", kind=FituneError)
    file.unlink()
    _refused(r"adapter_model\.safetensors: no such file", base, own_adapter, tmp_path / "out", kind=FituneError)
    (own_adapter / "adapter_config.json").write_text("{")
    _refused(r"adapter_config\.json: cannot be read", base, own_adapter, tmp_path / "out")
    _refused("no such file; give the folder of a PEFT", base, tmp_path / "nothing", tmp_path / "out")
    _refused(r"config\.json: no such file; give a folder with config", tmp_path / "no", own_adapter, tmp_path / "out")


def test_nan_in_the_adapter_is_refused(base, own_adapter, tmp_path):
    file = own_adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    _refused(
        r"model\.layers\.1\.mlp\.up_proj\.weight: not finite", base, own_adapter, tmp_path / "out", kind=FituneError
    )


def test_a_base_without_one_of_its_tensors_is_refused(own_base, own_adapter, tmp_path):
    for file in own_base.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop("model.norm.weight", None) is not None:
            save_file(tensors, file)
    index = json.loads((own_base / INDEX_NAME).read_text())
    del index["weight_map"]["model.norm.weight"]
    (own_base / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(FituneError, match=r"tensor model\.norm\.weight is missing"):
        merge_adapter(own_base, own_adapter, tmp_path / "out", progress=False, force=True)


def test_a_scale_that_is_no_number_is_refused(base, own_adapter, tmp_path):
    file = own_adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": float("nan")}))
    with pytest.raises(UsageError, match="alpha nan"):
        merge_adapter(base, own_adapter, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"hidden_size": 64}, r"the adapter is for shape \(\d+, \d+\), .* has \(\d+, \d+\)"),
        ({"num_layers": 1}, r"adapts model\.layers\.1\."),
        ({"num_layers": 3}, r"has model\.layers\.2\.\S+, which the adapter does not cover"),
    ],
    ids=str,
)
def test_a_base_of_other_shape_is_refused(base, tmp_path, sizes, said):
    adapter = _make_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    other = build_tiny_base(tmp_path / "other", **SIZES | sizes)
    _refused(said, other, adapter, tmp_path / "out")


def test_a_deeper_base_is_refused_by_the_record_too(base, own_adapter, tmp_path):
    """PEFT may list modules by full name, which alone cannot tell a partial adapter from a deeper base."""
    _record(base, own_adapter)
    _set(own_adapter / "adapter_config.json", target_modules=["model.layers.0.mlp.up_proj"])
    other = build_tiny_base(tmp_path / "other", **SIZES | {"num_layers": 3})
    _refused("has other tensors or shapes than the adapter's base tiny/base", other, own_adapter, tmp_path / "out")


def test_a_partial_adapter_with_a_record_is_merged(base, own_adapter, tmp_path):
    _record(base, own_adapter)
    file = own_adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if ".layers.1." not in n}, file)
    _set(own_adapter / "adapter_config.json", target_modules=ATTENTION)
    merge_adapter(base, own_adapter, tmp_path / "out", progress=False)
    assert _relative(_logits(tmp_path / "out"), _logits(base)) > 0.1


def _record(base, adapter):
    with Checkpoint(base) as checkpoint:
        write_base_record(adapter, BaseRecord("tiny/base", "main", base_fingerprint(checkpoint)))


def test_the_recorded_base_is_accepted_silently(base, own_adapter, tmp_path, capsys):
    _record(base, own_adapter)
    merge_adapter(base, own_adapter, tmp_path / "out", progress=False)
    assert capsys.readouterr().err == ""


def test_an_adapter_without_a_record_is_merged_with_a_note(base, adapter, tmp_path, capsys):
    merge_adapter(base, adapter, tmp_path / "out", progress=False)
    assert "no record of its base" in capsys.readouterr().err


@pytest.mark.parametrize("kind, said", [("seed", "not the weights of"), ("nf4", "its weights cannot be compared")])
def test_another_base_needs_force(base, nf4_base, own_adapter, tmp_path, capsys, kind, said):
    _record(base, own_adapter)
    other = nf4_base if kind == "nf4" else build_tiny_base(tmp_path / "other", seed=1, **SIZES)
    _refused(
        f"{said}.* tiny/base at main.*--force|tiny/base at main.*{said}.*--force", other, own_adapter, tmp_path / "out"
    )
    merge_adapter(other, own_adapter, tmp_path / "out", progress=False, force=True)
    assert said in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").exists()


def test_other_quantisation_is_refused(own_base, adapter, tmp_path):
    _set(own_base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    _refused("quantised with 'gptq'", own_base, adapter, tmp_path / "out")


def test_full_is_copied_whole(own_base, tmp_path):
    (own_base / "optimizer.pt").write_text("not part of a model")
    out = merge_full(own_base, tmp_path / "out", progress=False)
    assert torch.equal(_logits(out), _logits(own_base))
    expected = {file.name for file in own_base.iterdir()} - {"optimizer.pt"}
    assert {file.name for file in out.iterdir()} == expected
    with pytest.raises(UsageError, match="exists already"):
        merge_full(own_base, out, progress=False)
    _truncate_shard(own_base)
    with pytest.raises(FituneError, match="truncated"):
        merge_full(own_base, tmp_path / "again", progress=False)
    assert not (tmp_path / "again").exists()
