"""Hugging Face checkpoints on disk, read by byte range and written as a stream.

A safetensors file is 8 bytes of header length, a JSON header (name -> dtype, shape, byte range), then the tensors'
bytes (https://huggingface.co/docs/safetensors). Reading ranges ourselves lets each rank fetch only the rows it keeps,
into a buffer of its choice, and lets tests count every byte.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from fitune.config.stored_weights import ADVICE, INDEX_NAME, MAX_HEADER_BYTES
from fitune.errors import FituneError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NOT_READ = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4")
"Of quantised models."
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes at byte `offset` of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file, every byte range checked against the file's size.

    Raises FituneError naming the file, and the tensor where one is at fault.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise FituneError(f"{file}: not a whole safetensors file ({size} bytes, header of {length})")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"the header is a {type(header).__name__}, not an object")
    except FileNotFoundError:
        raise FituneError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FituneError(f"{file}: cannot be read as safetensors: {error}") from None
    metadata = header.pop("__metadata__", {})
    data_start, tensors = 8 + length, {}
    for name, entry in header.items():
        if isinstance(entry, dict) and entry.get("dtype") in NOT_READ:
            raise FituneError(f"{file}: tensor {name} is stored as {entry['dtype']}; {ADVICE}")
        try:
            (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
            if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
                raise ValueError
            info = TensorInfo(name, DTYPES[entry["dtype"]], shape, file, data_start + begin)
        except (KeyError, TypeError, ValueError):
            raise FituneError(f"{file}: tensor {name}: malformed header entry {entry}") from None
        if end - begin != info.nbytes:
            raise FituneError(f"{file}: tensor {name}: shape {info.shape} needs {info.nbytes} bytes, has {end - begin}")
        if data_start + end > size:
            raise FituneError(f"{file}: tensor {name}: truncated at {size} of at least {data_start + end} bytes")
        tensors[name] = info
    return tensors, metadata


class Checkpoint:
    """The tensors of a model folder as one table. Only headers are read until a tensor's bytes are asked for."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self.bytes_read = 0
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()
        for file, names in self._files().items():
            found, _ = read_header(file)
            for name in names if names is not None else found:
                if name not in found:
                    raise FituneError(f"{file}: tensor {name} is in {INDEX_NAME} but not in the file")
            for name, info in found.items():
                if name in self.tensors:
                    raise FituneError(f"{file}: tensor {name} is in {self.tensors[name].file.name} too")
                self.tensors[name] = info

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def _files(self) -> dict[Path, list[str] | None]:
        """Shard files with the tensors the index expects of each (None: all of them)."""
        index = self.folder / INDEX_NAME
        if not index.exists():
            single = self.folder / "model.safetensors"
            if not single.exists():
                raise FituneError(f"{self.folder}: holds neither {INDEX_NAME} nor model.safetensors")
            return {single: None}
        try:
            weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FituneError(f"{index}: not a valid index: {error!r}") from None
        files: dict[Path, list[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
                raise FituneError(f"{index}: tensor {name}: shard path '{shard}' leaves the model's folder")
            files.setdefault(self.folder / shard, []).append(name)
        return files

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise FituneError(f"{self.folder}: tensor {name} is missing")
        return self.tensors[name]

    def read_bytes(self, name: str, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Bytes [start, stop) of a tensor as uint8, into `out` (contiguous CPU uint8 of that length) if given."""
        info = self[name]
        if not 0 <= start <= stop <= info.nbytes:
            raise ValueError(f"{name}: bytes [{start}, {stop}) of {info.nbytes}")
        if out is None:
            out = torch.empty(stop - start, dtype=torch.uint8)
        view, done = memoryview(out.numpy()), 0
        while done < stop - start:
            count = os.preadv(self._handle(info.file), [view[done:]], info.offset + start + done)
            if count == 0:
                raise FituneError(f"{info.file}: tensor {name}: file ends early")
            done += count
        with self._lock:
            self.bytes_read += done
        return out

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) along dimension 0, in the stored dtype."""
        info = self[name]
        row_bytes = info.nbytes // info.shape[0]
        flat = self.read_bytes(name, start * row_bytes, stop * row_bytes)
        return flat.view(info.dtype).reshape(stop - start, *info.shape[1:])

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in the stored dtype."""
        info = self[name]
        return self.read_bytes(name, 0, info.nbytes).view(info.dtype).reshape(info.shape)

    def _handle(self, file: Path) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(file, os.O_RDONLY)
            return self._handles[file]

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written: its name, dtype and shape, known before its values are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointWriter:
    """Writes `specs`, in their order, as model*.safetensors under `folder`, one tensor in memory at a time.

    Shards hold at most `max_shard_bytes` unless one tensor is larger; `one_file` names a file that holds all, however
    large. File modes follow the umask. `write` must be called once per spec in the given order; `close` checks that and
    writes the index. `durable` waits for the disk. With `hashed`, `hashes` gets the SHA-256 of each file of tensors: of
    the bytes as they were in memory, by another thread while they are written.
    """

    def __init__(
        self,
        folder: Path,
        specs: Iterable[TensorSpec],
        max_shard_bytes: int = 5 * 10**9,
        *,
        one_file: str | None = None,
        durable=True,
        hashed=False,
    ):
        self.folder = folder
        self.hashes: dict[str, str] = {}
        self._durable, self._hashed = durable, hashed
        self._hasher = ThreadPoolExecutor(1) if hashed else None
        self._shards = {one_file: list(specs)} if one_file else self._split(list(specs), max_shard_bytes)
        self._pending = [(shard, spec) for shard, specs in self._shards.items() for spec in specs]
        self._stream = None
        self._open_shard: str | None = None

    @staticmethod
    def _split(specs: list[TensorSpec], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
        groups: list[list[TensorSpec]] = [[]]
        for spec in specs:
            if groups[-1] and sum(s.nbytes for s in groups[-1]) + spec.nbytes > max_shard_bytes:
                groups.append([])
            groups[-1].append(spec)
        if len(groups) == 1:
            return {"model.safetensors": groups[0]}
        return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        shard, spec = self._pending.pop(0)
        if (name, tensor.dtype, tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
            raise ValueError(f"expected {spec}, got {name} {tensor.dtype} {tuple(tensor.shape)}")
        if shard != self._open_shard:
            self._start(shard)
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._put(memoryview(flat.numpy()))

    def _put(self, data) -> None:
        """Both let other threads of Python run: hashing costs time only where the disk is faster than a core hashes."""
        hashed = self._hasher.submit(self._hash.update, data) if self._hasher else None
        self._stream.write(data)
        if hashed:
            hashed.result()

    def _start(self, shard: str) -> None:
        self._finish_shard()
        header, position = {"__metadata__": {"format": "pt"}}, 0
        for spec in self._shards[shard]:
            header[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.nbytes],
            }
            position += spec.nbytes
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)  # keeps the data 8-byte aligned
        self._stream, self._hash = (self.folder / shard).open("wb"), hashlib.sha256()
        self._put(len(encoded).to_bytes(8, "little") + encoded)
        self._open_shard = shard

    def _finish_shard(self) -> None:
        if self._stream:
            self._stream.flush()
            if self._durable:
                os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None
            if self._hashed:
                self.hashes[self._open_shard] = self._hash.hexdigest()

    def close(self) -> None:
        if self._pending:
            raise ValueError(f"{len(self._pending)} tensors were not written, first {self._pending[0][1].name}")
        if self._open_shard is None:  # no tensors: a file all the same
            self._start(next(iter(self._shards)))
        self._finish_shard()
        if self._hasher:
            self._hasher.shutdown()
        if len(self._shards) > 1:
            weight_map = {spec.name: shard for shard, specs in self._shards.items() for spec in specs}
            total = sum(spec.nbytes for specs in self._shards.values() for spec in specs)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
