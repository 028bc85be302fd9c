"""A base model's weights in full precision, whether stored so or in bitsandbytes' 4 bits, a few rows at a time."""

import json
import math
import re
from pathlib import Path

import torch

from fitune.config.base_model import check_precision, check_sizes
from fitune.config.json_file import read_json
from fitune.errors import FituneError
from fitune.weights.safetensors_files import Checkpoint

CHUNK_WEIGHTS = 2**24  # 64 MiB in fp32

_QUANT_STATE = re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$")
PACKED_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def read_base_config(base: Path) -> dict:
    """The base's config.json; UsageError for wrong sizes and for weights quantised in a way that cannot be read."""
    config = read_json(base / "config.json", "give a folder with config.json and *.safetensors")
    check_sizes(config, base / "config.json")
    check_precision(config, base / "config.json")
    return config


class BaseWeights:
    """The base's weights by name, 4-bit ones unpacked, a few rows at a time."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        shapes = unpacked_shapes(checkpoint)
        self.shapes = {n: shape for n, shape in shapes.items() if not n.endswith("rotary_emb.inv_freq")}  # a constant
        self._state_name, self._state = None, None

    def dtype(self, name: str) -> torch.dtype | None:
        """As stored; None for 4-bit weights."""
        return None if self._is_packed(name) else self.checkpoint[name].dtype

    def row_chunks(self, name: str) -> list[tuple[int, int]]:
        """[start, stop) of about CHUNK_WEIGHTS weights; cuts of a 4-bit weight fall between quantisation blocks."""
        rows, width = self.shapes[name][0], math.prod(self.shapes[name][1:])
        step = max(1, CHUNK_WEIGHTS // max(1, width))
        if self._is_packed(name):
            unit = self._quant_state(name).blocksize
            unit //= math.gcd(unit, width)
            step = -(-step // unit) * unit
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as stored, or in the dtype a 4-bit weight was quantised from."""
        if not self._is_packed(name):
            return self.checkpoint.read_rows(name, start, stop)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state, width = self._quant_state(name), math.prod(self.shapes[name][1:])
        first, last = start * width, stop * width
        part = QuantState(
            absmax=state.absmax[first // state.blocksize : -(-last // state.blocksize)],
            shape=_as_rows_of_whole_blocks(last - first, state.blocksize),
            dtype=state.dtype,
            blocksize=state.blocksize,
            code=state.code,
            quant_type=state.quant_type,
        )
        packed = self._packed_bytes(name, first // 2, -(-last // 2))
        return dequantize_4bit(packed.view(-1, 1), part).view(stop - start, width)

    def read(self, name: str) -> torch.Tensor:
        """The whole weight, as `rows` gives it."""
        if not self._is_packed(name):
            return self.checkpoint.read(name)
        return self.rows(name, 0, self.shapes[name][0])

    def _packed_bytes(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.checkpoint.read_bytes(name, start, stop)

    def _is_packed(self, name: str) -> bool:
        return any(f"{name}.quant_state.bitsandbytes__{kind}" in self.checkpoint for kind in ("nf4", "fp4"))

    def _quant_state(self, name: str):
        """bitsandbytes' QuantState of a packed weight, its absmax in fp32."""
        if self._state_name != name:
            from bitsandbytes.functional import QuantState, dequantize_blockwise

            parts = {n: self.checkpoint.read(n) for n in self.checkpoint.tensors if n.startswith(f"{name}.")}
            try:
                state = QuantState.from_dict(parts, device=torch.device("cpu"))
                if state.nested:
                    state.absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
            except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise FituneError(f"{self.checkpoint[name].file}: tensor {name}: broken quant state: {error}") from None
            self._state_name, self._state = name, state
        return self._state


def _as_rows_of_whole_blocks(numel: int, blocksize: int) -> torch.Size:
    """A shape of `numel` weights that bitsandbytes 0.50.2 dequantises rightly on CPUs with AVX-512.

    There its kernel takes every row to begin a block, whatever the row's length.
    """
    return torch.Size((1, numel) if numel % blocksize else (numel // blocksize, blocksize))


def is_in_four_bits(checkpoint: Checkpoint) -> bool:
    return any(_QUANT_STATE.search(name) for name in checkpoint.tensors)


def unpacked_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight, in the file's order; a bitsandbytes 4-bit weight by its shape before packing.

    Raises FituneError where a packed weight's description is broken or its parts are missing.
    """
    described = {name: name[: match.start()] for name in checkpoint.tensors if (match := _QUANT_STATE.search(name))}
    shapes = {}
    for state_name, name in described.items():
        try:
            state = json.loads(checkpoint.read(state_name).numpy().tobytes())
            shapes[name] = tuple(int(size) for size in state["shape"])
            parts = ["absmax", "quant_map"] + ["nested_absmax", "nested_quant_map"] * ("nested_blocksize" in state)
        except (ValueError, KeyError, TypeError) as error:
            raise FituneError(f"{checkpoint[state_name].file}: tensor {state_name}: broken: {error!r}") from None
        for part in parts:
            checkpoint[f"{name}.{part}"]
        if (math.prod(shapes[name]) + 1) // 2 != checkpoint[name].nbytes:
            info = checkpoint[name]
            raise FituneError(f"{info.file}: tensor {name}: {info.nbytes} bytes cannot hold {shapes[name]} in 4 bits")
    companions = {f"{name}.{part}" for name in shapes for part in PACKED_PARTS} | set(described)
    return {n: shapes.get(n, info.shape) for n, info in checkpoint.tensors.items() if n not in companions}
