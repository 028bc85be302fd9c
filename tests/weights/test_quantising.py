"""Weights quantised on the way in equal bitsandbytes' own, and each rank reads only its rows."""

import math

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from loading import CPU, load_and_count_bytes, quantised, same, state_content
from ranks import run_ranks, sharded_model, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fitune.model.nf4 import NF4Linear
from fitune.weights import load as weights
from fitune.weights.load import Placement
from fitune.weights.safetensors_files import Checkpoint, CheckpointWriter, TensorSpec
from fitune.weights.streaming import stream

SHAPES = [(8, 1), (1, 8), (3, 40), (5, 24), (65, 72), (7, 200), (173, 72), (24, 999), (300, 256), (64, 64)]
"Out and in features: fewer rows of packed weights than ranks, borders inside blocks, over 256 blocks, all even."


def _write(folder, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 5 * 10**9) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = CheckpointWriter(folder, specs, max_shard_bytes)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


def _bitsandbytes(weight: torch.Tensor) -> dict:
    packed, state = quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
    return {"bytes": packed.view(-1)} | state_content(state)


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
        found |= quantised(model)
    return found


def _load_both(run, folder, dtypes, chunk_bytes: int) -> dict:
    weights.CHUNK_BYTES = chunk_bytes
    model, count = load_and_count_bytes(run)
    lora = {name: whole(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    norms = {name: whole(p) for name, p in model.named_parameters() if "norm" in name}
    return {
        "model": quantised(model),
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
                assert same(report["model"][name], expected[name]), (world_size, name)
            assert set(report["shapes"]) == set(sources)
            for name, entry in expected_shapes.items():
                assert same(report["shapes"][name], entry), (world_size, name, entry["shape"])
            for name, norm in report["norms"].items():
                assert torch.equal(norm, whole.read(name.removeprefix("base_model.model.")).float())

            lora = lora or report["lora"]
            assert same(report["lora"], lora), "the adapter's start depends on the number of ranks"

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
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)  # five deviations of 512 draws
        assert not torch.equal(weight, other[name])
    queries = [weight for name, weight in adapter.items() if "q_proj.lora_A" in name]
    assert len(queries) == 2 and not torch.equal(*queries)


def _adapter(run) -> dict:
    model, _ = sharded_model(run)
    return {name: whole(p).detach() for name, p in model.named_parameters() if p.requires_grad}
