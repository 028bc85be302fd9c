"""What is wrong with a checkpoint is said before memory is taken, with the file and the tensor."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from loading import CPU, damaged_copy
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from fitune.data.dataset import load_tokenizer
from fitune.errors import FituneError, UsageError
from fitune.model.skeleton import build_skeleton
from fitune.training.distributed import join
from fitune.weights.accounting import account_for_every_tensor
from fitune.weights.load import Placement, load_weights
from fitune.weights.safetensors_files import Checkpoint


def _rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def _reshape(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name]).contiguous()})


def _transposed_state(state: torch.Tensor) -> torch.Tensor:
    content = json.loads(bytes(state.tolist()))
    return torch.tensor(list(json.dumps(content | {"shape": content["shape"][::-1]}).encode()), dtype=torch.uint8)


Q = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
DAMAGES = {
    "missing": ("base", lambda t: t.pop(Q), Q),
    "missing norm": ("base", lambda t: t.pop(NORM), NORM),
    "missing head": ("base", lambda t: (t.pop("lm_head.weight"), t.pop("model.embed_tokens.weight")), "embed_tokens"),
    "surplus": ("base", lambda t: t.update(extra=torch.zeros(3)), "extra"),
    "surplus bias": ("base", lambda t: t.update({Q.replace("weight", "bias"): torch.zeros(72)}), "q_proj.bias"),
    "a layer too many": ("base", _rename(Q, Q.replace("layers.1", "layers.2")), "layers"),
    "a row short": ("base", _reshape(Q, lambda w: w[1:]), Q),
    "transposed": ("base", _reshape("model.layers.0.mlp.down_proj.weight", lambda w: w.T), "down_proj"),
    "norm too long": ("base", _reshape(NORM, lambda w: torch.cat([w, w])), NORM),
    "integers": ("base", _reshape(Q, lambda w: w.to(torch.int8)), Q),
    "packed weight short": ("double", _reshape(Q, lambda w: w[:-8]), Q),
    "absmax missing": ("double", lambda t: t.pop(f"{Q}.absmax"), f"{Q}.absmax"),
    "absmax short": ("double", _reshape(f"{Q}.absmax", lambda w: w[:-1]), f"{Q}.absmax"),
    "quant_map missing": ("double", lambda t: t.pop(f"{Q}.quant_map"), f"{Q}.quant_map"),
    "nested_absmax missing": ("double", lambda t: t.pop(f"{Q}.nested_absmax"), f"{Q}.nested_absmax"),
    "no nested statistics": ("double", lambda t: [t.pop(f"{Q}.nested_{n}") for n in ("absmax", "quant_map")], f"{Q}."),
    "nested_quant_map missing": ("double", lambda t: t.pop(f"{Q}.nested_quant_map"), f"{Q}.nested_quant_map"),
    "quant_state of another shape": ("double", _reshape(f"{UP}.quant_state.bitsandbytes__nf4", _transposed_state), UP),
    "nested_absmax short": ("double", _reshape(f"{Q}.nested_absmax", lambda w: w[:-1]), f"{Q}.nested_absmax"),
    "quant_state missing": ("double", lambda t: t.pop(f"{Q}.quant_state.bitsandbytes__nf4"), Q),
    "norm missing, nf4": ("double", lambda t: t.pop(NORM), NORM),
    "surplus statistics": ("double", lambda t: t.update({f"{NORM}.absmax": torch.zeros(3)}), f"{NORM}.absmax"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_tensors_stop_the_load_before_memory_is_taken(damage, uneven_base, nf4_bases, make_run, tmp_path):
    kind, change, tensor = DAMAGES[damage]
    base = damaged_copy(nf4_bases[kind] if kind != "base" else uneven_base, tmp_path / "base", change)
    _assert_refused(make_run(base, tmp_path), tensor)


def _assert_refused(run, tensor: str) -> None:
    folder, skeleton = run.recipe.base.model, _skeleton(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory is taken before the error"))
        with pytest.raises(FituneError) as caught, Checkpoint(folder) as checkpoint:
            load_weights(skeleton, checkpoint, Placement(0, 1, CPU), seed=0)
    message = str(caught.value)
    assert tensor in message
    named = rf"{folder}: " if "is missing" in message else rf"{folder}/model\S*\.(safetensors|json): "
    assert re.search(named, message)
    assert "\n" not in message
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def _skeleton(run) -> torch.nn.Module:
    folder = run.recipe.base.model
    return build_skeleton(run.recipe, Path(folder), load_tokenizer(run.recipe, folder), torch.float32, "cpu")


def test_truncated_file_is_named_with_its_tensor(uneven_base, make_run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(uneven_base, base)
    file = sorted(base.glob("*.safetensors"))[1]
    last = max(Checkpoint(base).tensors.values(), key=lambda info: (info.file == file, info.offset))
    file.write_bytes(file.read_bytes()[:-5])
    _assert_refused(make_run(base, tmp_path), last.name)
    with pytest.raises(FituneError, match=file.name):
        Checkpoint(base)


def test_index_that_promises_another_tensor_names_the_file(uneven_base, make_run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(uneven_base, base)
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra"] = content["weight_map"][Q]
    index.write_text(json.dumps(content))
    _assert_refused(make_run(base, tmp_path), "model.extra")


@pytest.mark.parametrize(("name", "said"), [("model.extra", "has no place"), (Q, "is in model-")])
def test_a_tensor_that_the_index_does_not_know_is_surplus(name, said, uneven_base, make_run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(uneven_base, base)
    file = next(f for f in sorted(base.glob("*.safetensors")) if f != Checkpoint(base)[Q].file)
    save_file(load_file(file) | {name: torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(FituneError, match=said) as caught:
        account_for_every_tensor(_skeleton(make_run(base, tmp_path)), Checkpoint(base))
    assert name in str(caught.value) and file.name in str(caught.value)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_nf4_checkpoint_is_for_qlora_only(method, nf4_bases, make_run, tmp_path):
    """Also where config.json, which is looked at first, does not say so."""
    base = shutil.copytree(nf4_bases["double"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config))
    _assert_refused(make_run(base, tmp_path, method), "use qlora")


def _join_wrong(run) -> str:
    with pytest.raises(UsageError) as caught:
        join(run)
    return str(caught.value)


def test_another_number_of_processes_than_resolved_is_refused(uneven_base, make_run, tmp_path):
    run = make_run(uneven_base, tmp_path, processes=3)
    for message in run_ranks(_join_wrong, 2, run):
        assert "2 processes were started, the run needs 3" in message
