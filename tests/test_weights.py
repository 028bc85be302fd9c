"""What each rank reads from the checkpoint, and what it makes of it."""

import json
import math
import shutil

import pytest
import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from ranks import run_ranks, sharded_model
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from fitune import weights
from fitune.checkpoint import Checkpoint, CheckpointWriter, TensorSpec
from fitune.data.dataset import load_tokenizer
from fitune.distributed import join
from fitune.errors import FituneError, UsageError
from fitune.model import build_skeleton
from fitune.nf4 import NF4Linear
from fitune.streaming import stream
from fitune.weights import Placement, load_weights

CPU = torch.device("cpu")
SHAPES = [(8, 1), (1, 8), (3, 40), (5, 24), (65, 72), (7, 200), (173, 72), (24, 999), (300, 256), (64, 64)]
"Out and in features: fewer rows of packed weights than ranks, borders inside blocks, over 256 blocks, all even."


def _write(folder, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 5 * 10**9) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = CheckpointWriter(folder, specs, max_shard_bytes)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


def _statistics(state: QuantState) -> dict:
    """All that a QuantState holds, as tensors and plain values that compare with `_same`."""
    found = {"absmax": state.absmax, "code": state.code, "blocksize": state.blocksize, "type": state.quant_type}
    found |= {"shape": tuple(state.shape), "dtype": state.dtype, "nested": state.nested}
    if state.nested:
        nested = {"absmax": state.state2.absmax, "code": state.state2.code, "blocksize": state.state2.blocksize}
        found |= {f"nested {key}": value for key, value in nested.items()} | {"offset": state.offset}
    return found


def _same(found, expected) -> bool:
    if isinstance(expected, dict):
        return set(found) == set(expected) and all(_same(found[key], expected[key]) for key in expected)
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    return found == expected


def _packed(weight: torch.Tensor) -> torch.Tensor:
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return whole.detach().view(torch.uint8).view(-1).clone()


def _quantised(model) -> dict:
    """Packed bytes and statistics of every NF4 linear, by the checkpoint's name."""
    names = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    return {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.weight": {"bytes": _packed(module.weight)}
        | _statistics(module.quant_state)
        for name, module in names.items()
    }


def _bitsandbytes(weight: torch.Tensor) -> dict:
    packed, state = quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
    return {"bytes": packed.view(-1)} | _statistics(state)


def _count_bytes(run) -> int:
    """Loads `run` and returns the bytes this rank read from the base."""
    counted = []
    close = Checkpoint.close

    def record(self):
        counted.append(self.bytes_read)
        close(self)

    Checkpoint.close = record
    try:
        model, _ = sharded_model(run)
    finally:
        Checkpoint.close = close
    return model, sum(counted)


def _quantise_shapes(folder, dtypes: list[torch.dtype]) -> dict:
    """Streams one NF4 linear per shape and dtype, sharded, from the checkpoint in `folder`."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    found = {}
    for dtype in dtypes:
        model = torch.nn.Module()
        for index, (rows, columns) in enumerate(SHAPES):
            model.add_module(f"{dtype}-{index}".replace(".", "-"), NF4Linear(columns, rows, device="meta"))
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        with Checkpoint(folder) as checkpoint, torch.no_grad():
            loader = weights._Loader(model, checkpoint, Placement(mesh.get_rank(), mesh.size(), CPU), seed=0)
            for name, parameter in model.named_parameters():
                stream(checkpoint, loader.fill(name, parameter, name), pin_memory=False)
        found |= _quantised(model)
    return found


def _load_both(run, folder, dtypes, chunk_bytes: int) -> dict:
    weights.CHUNK_BYTES = chunk_bytes
    model, count = _count_bytes(run)
    lora = {name: parameter.full_tensor() for name, parameter in model.named_parameters() if parameter.requires_grad}
    norms = {name: p.full_tensor() for name, p in model.named_parameters() if "norm" in name}
    return {
        "model": _quantised(model),
        "bytes": count,
        "lora": lora,
        "norms": norms,
        "shapes": _quantise_shapes(folder, dtypes),
    }


def _touched_bytes(checkpoint: Checkpoint, quantised: set[str], world_size: int) -> int:
    """Bytes that all ranks together must read: each its rows; of quantised tensors whole blocks of 64 weights."""
    total = 0
    for name, info in checkpoint.tensors.items():
        rows = info.numel // 8 if name in quantised else info.shape[0]
        per_row = 8 if name in quantised else info.numel // info.shape[0]
        for chunk in torch.arange(rows).chunk(world_size):
            first, last = chunk[0].item() * per_row, (chunk[-1].item() + 1) * per_row
            if name in quantised:
                first, last = first // 64 * 64, min(-(-last // 64) * 64, info.numel)
            total += (last - first) * info.dtype.itemsize
    return total


def test_streaming_quantiser_equals_bitsandbytes_byte_for_byte(uneven_base, make_run, tmp_path):
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    generator = torch.Generator().manual_seed(0)
    sources = {}
    for dtype in dtypes:
        for index, shape in enumerate(SHAPES):
            weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
            weight[0, : shape[1] // 2] = 0
            sources[f"{dtype}-{index}".replace(".", "-") + ".weight"] = weight.to(dtype)
    _write(tmp_path / "shapes", sources)
    expected_shapes = {name: _bitsandbytes(weight) for name, weight in sources.items()}

    whole = Checkpoint(uneven_base)
    linears = {n for n in whole.tensors if ".layers." in n and "norm" not in n}
    expected = {name: _bitsandbytes(whole.read(name)) for name in linears}
    assert any(entry["nested absmax"].numel() > 1 for entry in expected.values())
    model_bytes = sum(info.nbytes for info in whole.tensors.values())
    lora = None

    for world_size, chunk_bytes in ((1, 1024), (1, weights.CHUNK_BYTES), (2, 256), (3, 1024), (3, weights.CHUNK_BYTES)):
        run = make_run(uneven_base, tmp_path, processes=world_size, lora={"r": 2})
        reports = run_ranks(_load_both, world_size, run, tmp_path / "shapes", dtypes, chunk_bytes)
        for report in reports:
            assert set(report["model"]) == linears
            for name in linears:
                assert _same(report["model"][name], expected[name]), (world_size, name)
            assert set(report["shapes"]) == set(sources)
            for name, entry in expected_shapes.items():
                assert _same(report["shapes"][name], entry), (world_size, name, entry["shape"])
            for name, norm in report["norms"].items():
                assert torch.equal(norm, whole.read(name.removeprefix("base_model.model.")).float())

            lora = lora or report["lora"]
            assert _same(report["lora"], lora), "the adapter's start depends on the number of ranks"

        read = [report["bytes"] for report in reports]
        assert sum(read) == _touched_bytes(whole, linears, world_size)
        # one model, plus the blocks that a border cuts: at most one per tensor and border
        assert model_bytes <= sum(read) <= model_bytes + (world_size - 1) * len(linears) * 64 * 2
        assert max(read) < 1.1 * model_bytes / world_size


def test_lora_starts_as_in_peft_and_differs_by_seed_and_layer(uneven_base, make_run, tmp_path):
    def start(seed):
        return run_ranks(_adapter, 1, make_run(uneven_base, tmp_path, "lora", seed=seed, lora={"r": 8}))[0]

    adapter, other = start(1), start(2)
    for name, weight in adapter.items():
        assert weight.dtype == torch.float32
        if "lora_B" in name:
            assert not weight.any()
            continue
        bound = 1 / math.sqrt(weight.shape[1])  # kaiming_uniform_(a=sqrt(5))
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not torch.equal(weight, other[name])
    queries = [weight for name, weight in adapter.items() if "q_proj.lora_A" in name]
    assert len(queries) == 2 and not torch.equal(*queries)


def _adapter(run) -> dict:
    model, _ = sharded_model(run)
    return {name: p.full_tensor().detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def nf4_bases(uneven_base, tmp_path_factory):
    """Checkpoints in bitsandbytes' format as transformers writes them: single, double, and packed in bfloat16."""
    options = {
        "double": {"bnb_4bit_use_double_quant": True},
        "single": {"bnb_4bit_use_double_quant": False},
        "stored as bf16": {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16},
    }
    folder, bases = tmp_path_factory.mktemp("nf4"), {}
    for name, option in options.items():
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **option
        )
        model = AutoModelForCausalLM.from_pretrained(
            uneven_base, dtype=torch.bfloat16, quantization_config=quantisation, device_map={"": "cpu"}
        )
        bases[name] = folder / name.replace(" ", "_")
        model.save_pretrained(bases[name], max_shard_size="200KB")
        AutoTokenizer.from_pretrained(uneven_base).save_pretrained(bases[name])
    return bases


def _load_prequantised(runs: dict) -> dict:
    report = {}
    for case, run in runs.items():
        model, count = _count_bytes(run)
        tokens = torch.arange(40).view(2, 20)
        report[case] = {"model": _quantised(model), "bytes": count, "logits": model(tokens).logits.detach()}
    return report


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_checkpoint_in_nf4_format_gives_the_same_bytes(world_size, nf4_bases, uneven_base, make_run, tmp_path):
    runs = {case: make_run(base, tmp_path, processes=world_size) for case, base in nf4_bases.items()}
    runs["quantised while loading"] = make_run(uneven_base, tmp_path, processes=world_size)
    reports = run_ranks(_load_prequantised, world_size, runs)
    for case, base in nf4_bases.items():
        checkpoint = Checkpoint(base)
        stored = {n for n in checkpoint.tensors if n.endswith(".weight")}
        statistics = sum(info.nbytes for name, info in checkpoint.tensors.items() if name not in stored)
        packed = sum(checkpoint[name].nbytes for name in stored)
        # the few bytes that say how a tensor is packed are read once more, to be checked before memory is taken
        states = sum(info.nbytes for name, info in checkpoint.tensors.items() if "quant_state" in name)
        read = sum(report[case]["bytes"] for report in reports) - packed
        assert world_size * statistics <= read <= world_size * (statistics + states)
        for report in reports:
            assert len(report[case]["model"]) == 14
            for name, entry in report[case]["model"].items():
                assert torch.equal(entry["bytes"], checkpoint.read(name).view(torch.uint8).view(-1)), (case, name)
                parts = {
                    n.removeprefix(f"{name}."): checkpoint.read(n)
                    for n in checkpoint.tensors
                    if n.startswith(f"{name}.")
                }
                assert _same(
                    {k: v for k, v in entry.items() if k != "bytes"},
                    _statistics(QuantState.from_dict(parts, device=CPU)),
                ), (case, name)
            if case != "single":
                streamed = report["quantised while loading"]
                assert _same(report[case]["model"], streamed["model"]), case
                assert torch.equal(report[case]["logits"], streamed["logits"]), case
    assert not torch.equal(reports[0]["single"]["logits"], reports[0]["double"]["logits"])


def _damaged(base, folder, change):
    """A copy of `base` as one file whose tensors `change` has altered."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = {}
    for file in sorted(base.glob("*.safetensors")):
        tensors |= load_file(file)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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
    base = _damaged(nf4_bases[kind] if kind != "base" else uneven_base, tmp_path / "base", change)
    _assert_refused(make_run(base, tmp_path), tensor)


def _assert_refused(run, tensor: str) -> None:
    folder = run.recipe.base.model
    skeleton = build_skeleton(run.recipe, folder, load_tokenizer(run.recipe, folder), torch.float32, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory is taken before the error"))
        with pytest.raises(FituneError) as caught, Checkpoint(folder) as checkpoint:
            load_weights(skeleton, checkpoint, Placement(0, 1, CPU), seed=0)
    assert tensor in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


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


@pytest.mark.parametrize("method", ["full", "lora"])
def test_nf4_checkpoint_is_for_qlora_only(method, nf4_bases, make_run, tmp_path):
    _assert_refused(make_run(nf4_bases["double"], tmp_path, method), "use qlora")


@pytest.fixture(scope="module")
def tied_base(uneven_base, tmp_path_factory):
    """A model whose head is its embedding, stored once."""
    folder = _damaged(uneven_base, tmp_path_factory.mktemp("tied") / "base", lambda t: t.pop("lm_head.weight"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


TRAINED = ["<|eot_id|>", "<|start_header_id|>"]


def _logits_and_tokens(runs: dict, tokens) -> dict:
    report = {}
    for case, run in runs.items():
        model, tokenizer = sharded_model(run)
        ids = tokenizer.convert_tokens_to_ids(TRAINED)
        deltas = {n: p for n, p in model.named_parameters() if "trainable_tokens_delta" in n}
        report[case] = {"logits": model(tokens).logits.detach(), "ids": ids}
        if deltas:
            report[case]["start"] = {_layer_of(n): delta.full_tensor().detach().clone() for n, delta in deltas.items()}
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
            assert torch.equal(report["tied"]["logits"], tied(tokens).logits)

            plain = LlamaForCausalLM.from_pretrained(uneven_base, dtype=torch.float32)
            found = report["tokens"]
            assert set(found["ids"]) <= set(tokens.view(-1).tolist())
            assert set(found["start"]) == {"model.embed_tokens", "lm_head"}
            for name, rows in found["start"].items():
                assert torch.equal(rows, plain.get_submodule(name).weight[found["ids"]])
            torch.testing.assert_close(found["logits"], plain(tokens).logits, rtol=1e-5, atol=1e-6)
            with torch.no_grad():
                for name in found["start"]:
                    plain.get_submodule(name).weight[found["ids"]] *= -1
            torch.testing.assert_close(found["changed"], plain(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"method": "full"}, {"method": "lora", "lora": {"trainable_tokens": TRAINED}}])
def test_training_a_part_of_tied_embeddings_is_refused(options, tied_base, make_run, tmp_path):
    run = make_run(tied_base, tmp_path, **options)
    with pytest.raises(UsageError, match="tie_word_embeddings"):
        build_skeleton(run.recipe, tied_base, load_tokenizer(run.recipe, tied_base), torch.float32, "cpu")


def _join_wrong(settings) -> str:
    with pytest.raises(UsageError) as caught:
        join(settings)
    return str(caught.value)


def test_another_number_of_processes_than_resolved_is_refused(uneven_base, make_run, tmp_path):
    run = make_run(uneven_base, tmp_path, processes=3)
    for message in run_ranks(_join_wrong, 2, run.accelerate):
        assert "2 processes were started, the run needs 3" in message
