"""The weights of base and adapter as one model, a few rows at a time: what merge writes."""

import math

import torch

from fitune.config.adapter_folder import ADAPTER_WEIGHTS
from fitune.config.stored_weights import EMBEDDING, HEAD
from fitune.errors import UsageError
from fitune.export.adapter import AdapterFile, Lora
from fitune.weights.base_weights import BaseWeights


class TunedWeights:
    """`base` with `lora` applied. Raises UsageError if they do not fit together.

    `shapes` names every weight of the tuned model. An embedding and a head that are one tensor in the base become two
    where the adapter changes only one of them; `ties_head` says whether they are still one.
    """

    def __init__(self, base: BaseWeights, lora: Lora, file: AdapterFile | None, *, tied: bool):
        self.base, self.lora, self.file = base, lora, file
        self._parts_name, self._parts = None, {}
        shared = tied and HEAD not in base.shapes
        self.ties_head = shared and not self._changes_one_of_two()
        self.shapes = dict(base.shapes)
        if shared and not self.ties_head:
            self.shapes[HEAD] = base.shapes[EMBEDDING]
        self._check_targets()
        self.shapes |= {name: file[tensor].shape for name, tensor in lora.replaced.items()}

    def stored_name(self, name: str) -> str:
        """The base's name of a weight: a head that is stored as the embedding has that one's."""
        return EMBEDDING if name == HEAD and HEAD not in self.base.shapes else name

    def is_changed(self, name: str) -> bool:
        return name in self.lora.changes()

    def dtype(self, name: str) -> torch.dtype | None:
        """As the base stores it; None for 4-bit weights."""
        return self.base.dtype(self.stored_name(name))

    def row_chunks(self, name: str) -> list[tuple[int, int]]:
        """[start, stop) of the rows that are taken at a time."""
        chunks = self.base.row_chunks(self.stored_name(name))
        rows = self.shapes[name][0]
        if rows == chunks[-1][1]:
            return chunks
        step = chunks[0][1]  # with added tokens, or fewer
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def base_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows before LoRA, in fp32, a copy: the base's, or the adapter's own where it replaces the weight."""
        if name in self.lora.replaced:
            return self.file.read_rows(self.lora.replaced[name], start, stop).float()
        return self.base.rows(self.stored_name(name), start, stop).to(torch.float32, copy=True)

    def merge_into(self, rows: torch.Tensor, name: str, start: int, stop: int) -> torch.Tensor:
        """Adds the adapter's change to fp32 `rows` [start, stop) in place, and returns them."""
        parts = self.parts(name)
        if name in self.lora.pairs:
            rows.addmm_(parts["b"][start:stop].to(rows.device), parts["a"].to(rows.device), alpha=parts["scale"])
            if "magnitude" in parts:
                length = rows.norm(dim=1, keepdim=True)
                rows *= parts["magnitude"][start:stop].to(rows.device).unsqueeze(1) / length
        if name in self.lora.embeddings:
            rows.addmm_(parts["a"][:, start:stop].T, parts["b"].T, alpha=parts["scale"])
        if name in self.lora.tokens:
            for row, token in zip(parts["rows"], self.lora.tokens[name][1], strict=True):
                if start <= token < stop:
                    rows[token - start] = row
        return rows

    def parts(self, name: str) -> dict:
        """The adapter's tensors for one weight in fp32, with LoRA's scale."""
        if self._parts_name != name:
            self._parts_name, self._parts = name, self._read_parts(name)
        return self._parts

    def _read_parts(self, name: str) -> dict:
        parts = {}
        if pair := self.lora.pairs.get(name) or self.lora.embeddings.get(name):
            parts |= {"a": self.file.read(pair.a).float(), "b": self.file.read(pair.b).float(), "scale": pair.scale}
            if magnitude := getattr(pair, "magnitude", None):
                parts["magnitude"] = self.file.read(magnitude).float()
        if name in self.lora.tokens:
            parts["rows"] = self.file.read(self.lora.tokens[name][0]).float()
        return parts

    def _changes_one_of_two(self) -> bool:
        """Whether a head that is the embedding's tensor in the base must become one of its own.

        Trained token rows are the exception: PEFT trains one set of rows for both.
        """
        lora = self.lora
        return bool({EMBEDDING, HEAD} & {*lora.pairs, *lora.embeddings, *lora.replaced}) or HEAD in lora.tokens

    def _check_targets(self) -> None:
        """Every tensor of the adapter fits a weight of the base."""
        for name in sorted(self.lora.changes()):
            if name not in self.shapes:
                where, base = self.file.folder / ADAPTER_WEIGHTS, self.base.checkpoint.folder
                raise UsageError(f"{where}: adapts {name}, which {base} does not have; give the base it was trained on")
            self._check_shapes(name, self.shapes[name])
        resized = {name for name, tensor in self.lora.replaced.items() if self.file[tensor].shape != self.shapes[name]}
        if resized and not self.ties_head and resized != {EMBEDDING, HEAD}:
            raise UsageError(
                f"{self.file.folder}: {min(resized)} has another number of tokens than the base, and the adapter holds "
                f"no {' and no '.join(sorted({EMBEDDING, HEAD} - resized))} to go with it"
            )

    def _check_shapes(self, name: str, needed: tuple[int, ...]) -> None:
        lora, shape = self.lora, lambda tensor: self.file[tensor].shape
        given = fits = None
        if pair := lora.pairs.get(name):
            given = (shape(pair.b)[0], shape(pair.a)[1])
            fits = given == needed and (pair.magnitude is None or math.prod(shape(pair.magnitude)) == needed[0])
        elif pair := lora.embeddings.get(name):
            given = (shape(pair.a)[1], shape(pair.b)[0])
            fits = given == needed
        if name in lora.replaced:
            given = shape(lora.replaced[name])
            fits = given == needed or (name in (EMBEDDING, HEAD) and given[1:] == needed[1:])
            needed = given
        if fits is not False and name in lora.tokens:
            given, rows = shape(lora.tokens[name][0]), lora.tokens[name][1]
            fits = given[1:] == needed[1:] and max(rows) < needed[0]
        if not fits:
            raise UsageError(
                f"{self.file.folder / ADAPTER_WEIGHTS}: {name}: the adapter is for shape {given}, "
                f"{self.base.checkpoint.folder} has {needed}; wrong base?"
            )
