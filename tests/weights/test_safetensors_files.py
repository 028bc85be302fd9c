import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fitune.errors import FituneError
from fitune.weights.safetensors_files import INDEX_NAME, Checkpoint, CheckpointWriter, TensorSpec, read_header

TENSORS = {
    "matrix": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "half": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4, dtype=torch.float16),
}


def _write(folder, tensors=TENSORS, max_shard_bytes=10**9):
    folder.mkdir(exist_ok=True)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = CheckpointWriter(folder, specs, max_shard_bytes)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    return folder


def _raw(file, header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 50])
def test_what_is_written_is_read_back(tmp_path, max_shard_bytes):
    folder = _write(tmp_path / "model", max_shard_bytes=max_shard_bytes)
    with Checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)
        for name, tensor in TENSORS.items():
            found = checkpoint.read(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_safetensors_itself_reads_what_is_written(tmp_path):
    found = load_file(_write(tmp_path / "model") / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_what_safetensors_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, metadata = read_header(tmp_path / "model.safetensors")
    assert metadata == {"format": "pt"}
    with Checkpoint(tmp_path) as checkpoint:
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())


def test_rows_cost_their_own_bytes_only(tmp_path):
    with Checkpoint(_write(tmp_path / "model")) as checkpoint:
        assert torch.equal(checkpoint.read_rows("matrix", 2, 5), TENSORS["matrix"][2:5])
        assert checkpoint.bytes_read == 3 * 4 * 4
        buffer = torch.zeros(8, dtype=torch.uint8)
        assert checkpoint.read_bytes("matrix", 4, 12, out=buffer) is buffer
        assert torch.equal(buffer.view(torch.float32), torch.tensor([1.0, 2.0]))
        with pytest.raises(ValueError, match="bytes"):
            checkpoint.read_bytes("matrix", 0, 97)


def test_shards_respect_the_limit_and_the_index_names_them(tmp_path):
    folder = _write(tmp_path / "model", max_shard_bytes=50)
    index = json.loads((folder / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert set(index["weight_map"]) == set(TENSORS)
    for file in folder.glob("*.safetensors"):
        tensors, _ = read_header(file)
        assert len(tensors) == 1 or sum(info.nbytes for info in tensors.values()) <= 50


def test_a_tensor_that_would_pass_the_limit_begins_a_shard(tmp_path):
    folder = _write(tmp_path / "model", {name: torch.ones(6) for name in "abc"}, max_shard_bytes=50)
    assert [len(read_header(file)[0]) for file in sorted(folder.glob("*.safetensors"))] == [2, 1]


def test_tensors_begin_where_a_reader_can_map_them(tmp_path):
    """At a multiple of 8 bytes, whatever the length of the names before them."""
    for name in ("a", "ab", "abc", "abcdefgh"):
        tensors, _ = read_header(_write(tmp_path / name, {name: torch.ones(3)}) / "model.safetensors")
        assert tensors[name].offset % 8 == 0


def test_hashes_are_those_of_the_files_which_the_disk_has(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def note(handle):
        fsync(handle)
        flushed.append(Path(f"/proc/self/fd/{handle}").resolve().name)

    monkeypatch.setattr(os, "fsync", note)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    writer = CheckpointWriter(tmp_path, specs, max_shard_bytes=50, hashed=True)
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert writer.hashes == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert flushed == [file.name for file in files]


@pytest.mark.parametrize("umask, mode", [(0o077, 0o600), (0o022, 0o644)])
def test_modes_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        folder = _write(tmp_path / "model", max_shard_bytes=50)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {mode}


def test_writer_insists_on_its_plan(tmp_path):
    specs = [TensorSpec("a", torch.float32, (2,)), TensorSpec("b", torch.float32, (2,))]
    writer = CheckpointWriter(tmp_path, specs)
    with pytest.raises(ValueError, match="expected"):
        writer.write("a", torch.zeros(3))
    writer = CheckpointWriter(tmp_path, specs)
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="1 tensors were not written, first b"):
        writer.close()


def test_non_contiguous_tensors_are_written_right(tmp_path):
    turned = TENSORS["matrix"].t()
    with Checkpoint(_write(tmp_path / "model", {"turned": turned})) as checkpoint:
        assert torch.equal(checkpoint.read("turned"), turned)


def test_missing_files_and_tensors_are_named(tmp_path):
    with pytest.raises(FituneError, match="holds neither"):
        Checkpoint(tmp_path)
    folder = _write(tmp_path / "model", max_shard_bytes=50)
    with Checkpoint(folder) as checkpoint, pytest.raises(FituneError, match="tensor other is missing"):
        checkpoint.read("other")
    next(folder.glob("model-00001*")).unlink()
    with pytest.raises(FituneError, match=r"model-00001-of-\d+.safetensors: no such file"):
        Checkpoint(folder)


def test_a_tensor_the_index_promises_must_be_there(tmp_path):
    folder = _write(tmp_path / "model")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"ghost": "model.safetensors"}}))
    with pytest.raises(FituneError, match="tensor ghost is in"):
        Checkpoint(folder)


@pytest.mark.parametrize("cut", [1, 60, 10**6], ids=["one byte", "in the data", "everything"])
def test_a_truncated_file_is_refused(tmp_path, cut):
    file = _write(tmp_path / "model") / "model.safetensors"
    os.truncate(file, max(0, file.stat().st_size - cut))
    with pytest.raises(FituneError, match=r"model\.safetensors: .*(truncated|not a whole)"):
        Checkpoint(tmp_path / "model")


def test_a_file_without_its_last_byte_is_refused(tmp_path):
    file = _write(tmp_path / "model", {"only": torch.ones(3)}) / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(FituneError, match="tensor only: truncated"):
        Checkpoint(tmp_path / "model")


def test_a_file_cut_after_opening_is_noticed(tmp_path):
    file = _write(tmp_path / "model") / "model.safetensors"
    with Checkpoint(tmp_path / "model") as checkpoint:
        os.truncate(file, checkpoint["matrix"].offset + 8)
        with pytest.raises(FituneError, match="file ends early"):
            checkpoint.read("matrix")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret", "sub/x.safetensors", "..", "", 5, None])
def test_shards_outside_the_folder_are_refused(tmp_path, shard):
    _write(tmp_path, {"x": torch.zeros(1)}).joinpath("model.safetensors").rename(tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(FituneError, match="leaves the model's folder"):
        Checkpoint(folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": null}'])
def test_a_broken_index_is_refused(tmp_path, index):
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(FituneError, match="not a valid index"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"shape": [2]},
        "nothing",
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    ],
    ids=str,
)
def test_a_hostile_header_entry_is_refused_by_name(tmp_path, entry):
    _raw(tmp_path / "model.safetensors", {"bad": entry}, b"\0" * 8)
    with pytest.raises(FituneError, match="tensor bad"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("header", [b"[]", b"{", b"\xff\xfe", b"[" * 100_000], ids=["list", "cut", "binary", "deep"])
def test_a_broken_header_is_refused(tmp_path, header):
    _raw(tmp_path / "model.safetensors", header)
    with pytest.raises(FituneError, match="cannot be read as safetensors"):
        Checkpoint(tmp_path)
