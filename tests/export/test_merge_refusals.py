"""What merge refuses before it writes anything: damaged bases, adapters it cannot apply exactly, another base."""

import json

import pytest
import torch
from adapters import ATTENTION, SIZES, logits, refused, set_values, truncate_shard
from bases import make_adapter
from rounding import distance
from safetensors.torch import load_file, save_file

from fitune.demo.tiny_base import build_tiny_base
from fitune.errors import FituneError, UsageError
from fitune.export.merge import merge_adapter
from fitune.weights.base_identity import BaseRecord, base_fingerprint, write_base_record
from fitune.weights.safetensors_files import INDEX_NAME, Checkpoint


def _remove_shard(folder):
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()


def _escape(folder):
    index = folder / INDEX_NAME
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../lm_head.safetensors"
    index.write_text(json.dumps(content))


def _drop_tensor(folder):
    name, index = "model.layers.1.mlp.up_proj.weight", folder / INDEX_NAME
    content = json.loads(index.read_text())
    file = folder / content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, said",
    [
        (truncate_shard, "truncated"),
        (_remove_shard, "no such file"),
        (_escape, r"'\.\./lm_head\.safetensors' leaves the model's folder"),
        (_drop_tensor, r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"),
    ],
)
def test_a_damaged_base_is_refused_before_anything_is_written(own_base, adapter, tmp_path, damage, said):
    damage(own_base)
    refused(said, own_base, adapter, tmp_path / "out", kind=FituneError)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"use_dora": True}, "use_dora, but .*lora_magnitude_vector is missing"),
        ({"bias": "some"}, "bias='some' is not supported"),
        ({"lora_bias": True}, "lora_bias"),
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
    set_values(own_adapter / "adapter_config.json", **change)
    refused(said, base, own_adapter, tmp_path / "out")


def test_dora_on_an_embedding_is_refused_by_name(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", use_dora=True, target_modules=["q_proj", "embed_tokens"])
    refused(r"use_dora on model\.embed_tokens: merge reads DoRA on linears", base, adapter, tmp_path / "out")


def test_adapter_files_are_named_in_errors(base, own_adapter, tmp_path):
    file = own_adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.model.norm.weight": torch.zeros(2)}, file)
    refused(r"tensor base_model\.model\.model\.norm\.weight is neither", base, own_adapter, tmp_path / "out")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, file)
    refused(r"lm_head\.weight: the adapter is for shape \(2,\)", base, own_adapter, tmp_path / "out")
    save_file({n: t for n, t in tensors.items() if "layers.0.mlp.up_proj.lora_B" not in n}, file)
    refused(r"up_proj\.lora_B\.weight is missing", base, own_adapter, tmp_path / "out", kind=FituneError)
    pickled = file.rename(own_adapter / "adapter_model.bin")
    refused(r"adapter_model\.bin: a pickle, which is not read; load", base, own_adapter, tmp_path / "out")
    pickled.unlink()
    refused(r"adapter_model\.safetensors: no such file", base, own_adapter, tmp_path / "out", kind=FituneError)
    (own_adapter / "adapter_config.json").write_text("{")
    refused(r"adapter_config\.json: cannot be read", base, own_adapter, tmp_path / "out")
    refused("no such file; give the folder of a PEFT", base, tmp_path / "nothing", tmp_path / "out")
    refused(r"config\.json: no such file; give a folder with config", tmp_path / "no", own_adapter, tmp_path / "out")


def test_nan_in_the_adapter_is_refused(base, own_adapter, tmp_path):
    file = own_adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    refused(
        r"model\.layers\.1\.mlp\.up_proj\.weight: not finite", base, own_adapter, tmp_path / "out", kind=FituneError
    )


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (0x7FFFFFFF, torch.bfloat16),  # a NaN that rounding up carries over into -0.0
        (0x49742400, torch.float16),  # 1e6
    ],
    ids=["nan", "too large"],
)
def test_what_is_not_finite_before_or_after_rounding_is_refused(bits, dtype, base, own_adapter, tmp_path):
    file = own_adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    [rows] = [name for name in tensors if "trainable_tokens_delta" in name]
    tensors[rows] = tensors[rows].float()
    tensors[rows].view(torch.int32)[0].fill_(bits)
    save_file(tensors, file)
    said = r"model\.embed_tokens\.weight: not finite"
    refused(said, base, own_adapter, tmp_path / "out", kind=FituneError, dtype=dtype)


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
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    other = build_tiny_base(tmp_path / "other", **SIZES | sizes)
    refused(said, other, adapter, tmp_path / "out")


def test_a_deeper_base_is_refused_by_the_record_too(base, own_adapter, tmp_path):
    """PEFT may list modules by full name, which alone cannot tell a partial adapter from a deeper base."""
    _record(base, own_adapter)
    set_values(own_adapter / "adapter_config.json", target_modules=["model.layers.0.mlp.up_proj"])
    other = build_tiny_base(tmp_path / "other", **SIZES | {"num_layers": 3})
    refused("has other tensors or shapes than the adapter's base tiny/base", other, own_adapter, tmp_path / "out")


def test_a_partial_adapter_with_a_record_is_merged(base, own_adapter, tmp_path):
    _record(base, own_adapter)
    file = own_adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if ".layers.1." not in n}, file)
    set_values(own_adapter / "adapter_config.json", target_modules=ATTENTION)
    merge_adapter(base, own_adapter, tmp_path / "out", progress=False)
    assert distance(logits(tmp_path / "out"), logits(base)) > 0.1


def _record(base, adapter):
    with Checkpoint(base) as checkpoint:
        write_base_record(adapter, BaseRecord("tiny/base", "main", base_fingerprint(checkpoint)))


def test_the_recorded_base_is_accepted_silently(base, own_adapter, tmp_path, capsys):
    _record(base, own_adapter)
    merge_adapter(base, own_adapter, tmp_path / "out", progress=False, check=False)
    assert capsys.readouterr().err == ""


def test_an_adapter_without_a_record_is_merged_with_a_note(base, adapter, tmp_path, capsys):
    merge_adapter(base, adapter, tmp_path / "out", progress=False)
    assert "no record of its base" in capsys.readouterr().err


@pytest.mark.parametrize("kind, said", [("seed", "not the weights of"), ("nf4", "its weights cannot be compared")])
def test_another_base_needs_force(base, nf4_base, own_adapter, tmp_path, capsys, kind, said):
    _record(base, own_adapter)
    other = nf4_base if kind == "nf4" else build_tiny_base(tmp_path / "other", seed=1, **SIZES)
    refused(
        f"{said}.* tiny/base at main.*--force|tiny/base at main.*{said}.*--force", other, own_adapter, tmp_path / "out"
    )
    merge_adapter(other, own_adapter, tmp_path / "out", progress=False, force=True)
    assert said in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").exists()


def test_other_quantisation_is_refused(own_base, adapter, tmp_path):
    set_values(own_base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused("quantised by gptq", own_base, adapter, tmp_path / "out")
