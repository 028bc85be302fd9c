"""A base as QLoRA computes with it: the layers' matrices through NF4 and back, a few rows at a time."""

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise, quantize_4bit

from fitune.model.nf4 import BLOCK
from fitune.weights.base_weights import CHUNK_WEIGHTS, BaseWeights
from fitune.weights.load import double_quantised
from fitune.weights.quantize import is_quantised


class WeightsThroughNF4(BaseWeights):
    """`BaseWeights` whose matrices of the decoder layers are quantised here, as training does when it loads them.

    Memory holds one matrix in 4 bits beside the rows that are asked for. What is stored in 4 bits is left as it is.
    """

    def __init__(self, checkpoint, device: torch.device | None = None):
        """`device` quantises, by default a GPU if there is one, as in training.

        A CPU takes two fifths of a merge for it, and may round a weight halfway between two values otherwise.
        """
        super().__init__(checkpoint)
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._packed_name, self._packed = None, None

    def _is_packed(self, name: str) -> bool:
        return super()._is_packed(name) or is_quantised(name, self.shapes[name])

    def _quant_state(self, name: str) -> QuantState:
        if super()._is_packed(name):
            return super()._quant_state(name)
        if self._packed_name != name:
            self._packed_name, (self._packed, self._packed_state) = name, self._quantise(name)
        return self._packed_state

    def _packed_bytes(self, name: str, start: int, stop: int) -> torch.Tensor:
        if super()._is_packed(name):
            return super()._packed_bytes(name, start, stop)
        return self._packed[start:stop]

    def _quantise(self, name: str) -> tuple[torch.Tensor, QuantState]:
        """(packed bytes, state with its absmax in fp32): blocks are independent, so whole blocks at a time."""
        info = self.checkpoint[name]
        packed = torch.empty(-(-info.numel // 2), dtype=torch.uint8)
        absmax = torch.empty(-(-info.numel // BLOCK), dtype=torch.float32, device=self._device)
        step, size = CHUNK_WEIGHTS // BLOCK * BLOCK or BLOCK, info.dtype.itemsize
        for start in range(0, info.numel, step):
            stop = min(start + step, info.numel)
            weights = self.checkpoint.read_bytes(name, start * size, stop * size).view(info.dtype)
            part, state = quantize_4bit(weights.to(self._device), blocksize=BLOCK, quant_type="nf4")
            packed[start // 2 : -(-stop // 2)] = part.view(-1)
            absmax[start // BLOCK : -(-stop // BLOCK)] = state.absmax
        state = double_quantised(absmax, info.shape, info.dtype)
        state.absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).cpu()
        state.code = state.code.cpu()
        return packed, state
