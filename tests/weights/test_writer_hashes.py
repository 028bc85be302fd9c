"""A checkpoint's hashes are of what was in memory, not of what a disk made of it."""

import hashlib

import torch

from fitune.weights import safetensors_files
from fitune.weights.safetensors_files import CheckpointWriter, TensorSpec

SPECS = [TensorSpec("a", torch.float32, (5, 3)), TensorSpec("b", torch.bfloat16, (7,))]


def write(folder, max_shard_bytes: int) -> dict[str, str]:
    writer = CheckpointWriter(folder, SPECS, max_shard_bytes, hashed=True)
    for spec in SPECS:
        writer.write(spec.name, torch.ones(spec.shape, dtype=spec.dtype))
    writer.close()
    return writer.hashes


def on_disk(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_each_files_hash_is_that_of_its_bytes(tmp_path):
    for name, limit, files in (("one", 10**9, 1), ("two", 1, 2)):
        (tmp_path / name).mkdir()
        hashes = write(tmp_path / name, limit)
        assert len(hashes) == files and hashes == on_disk(tmp_path / name)


def test_what_the_disk_got_wrong_does_not_get_into_the_hash(tmp_path, monkeypatch):
    good = write(tmp_path, 10**9)

    class Disk:
        """Writes the last byte of all that is longer than a header's length wrongly."""

        def __init__(self, stream):
            self.stream = stream

        def write(self, data) -> None:
            self.stream.write(bytes(data)[:-1] + b"\x55")

        def __getattr__(self, name):
            return getattr(self.stream, name)

    start = CheckpointWriter._start

    def on_a_bad_disk(self, shard):
        start(self, shard)
        self._stream = Disk(self._stream)

    monkeypatch.setattr(safetensors_files.CheckpointWriter, "_start", on_a_bad_disk)
    assert write(tmp_path, 10**9) == good != on_disk(tmp_path)
