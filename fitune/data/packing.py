"""SPLIT.packed.arrow: which tokens of SPLIT.tokens.arrow make up each row as the model sees it.

Packed, a row holds whole conversations, best fit decreasing, in the order that TRL's `pack_dataset(strategy="bfd")`
gives them; else one. Conversations longer than a row are cut, plain texts split into as many pieces as they fill.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fitune.data.arrow_columns import lists

TRL_PACKING_BATCH = 1000
"Rows that TRL packs together (datasets.map's batch size)."


@dataclass(frozen=True)
class Pieces:
    """Stretches of tokens: `start` to `stop` of a row of the token file, in the order of training rows."""

    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    pieces_of: np.ndarray
    "How many of them each training row holds."

    @property
    def rows(self) -> int:
        return len(self.pieces_of)


def lay_out(lengths: np.ndarray, is_text: np.ndarray, max_length: int, packing: bool) -> Pieces:
    """The training rows of `lengths` tokens each; `is_text` says which may be split."""
    row, start, stop = _cut(lengths, is_text, max_length)
    if not packing:
        return Pieces(row, start, stop, np.ones(len(row), np.int32))
    order, pieces_of = [], []
    for first in range(0, len(row), TRL_PACKING_BATCH):
        bins = best_fit_decreasing((stop - start)[first : first + TRL_PACKING_BATCH], max_length)
        for members in bins:
            order += [first + member for member in members]
            pieces_of.append(len(members))
    return Pieces(row[order], start[order], stop[order], np.array(pieces_of, np.int32))


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of indices. Bit s of `spaces` says that an open bin has s positions left; of those, the oldest is filled."""
    spaces, bins = 0, []
    bins_with: dict[int, deque[list[int]]] = {}
    for index in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[index])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            members = bins_with[space].popleft()
            if not bins_with[space]:
                spaces &= ~(1 << space)
        else:
            space, members = capacity, []
            bins.append(members)
        members.append(index)
        if left := space - length:
            bins_with.setdefault(left, deque()).append(members)
            spaces |= 1 << left
    return bins


def _cut(lengths: np.ndarray, is_text: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(row, start, stop)` of each piece, in the order of the rows; empty rows have none."""
    lengths = lengths.astype(np.int64)
    pieces = np.where(is_text, -(-lengths // max_length), np.minimum(lengths, 1))
    row = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = number * max_length
    stop = np.minimum(start + max_length, lengths[row])
    return row.astype(np.int32), start.astype(np.int32), stop.astype(np.int32)


def write_layout(path: Path, pieces: Pieces) -> None:
    import pyarrow

    columns = {name: lists(getattr(pieces, name), pieces.pieces_of) for name in ("row", "start", "stop")}
    batch = pyarrow.record_batch(columns)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


class Layout:
    """What `write_layout` wrote, memory-mapped; or Pieces that were just made. Both answer `layout[i]`."""

    def __init__(self, source: Path | Pieces):
        self._source = source
        if isinstance(source, Pieces):
            self._columns = source.row, source.start, source.stop
            self._offsets = np.concatenate([[0], np.cumsum(source.pieces_of, dtype=np.int64)])
        else:
            import pyarrow

            columns = pyarrow.ipc.open_file(pyarrow.memory_map(str(source))).get_batch(0).columns
            self._columns = tuple(column.values.to_numpy() for column in columns)
            self._offsets = columns[0].offsets.to_numpy()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __reduce__(self):
        return Layout, (self._source,)

    def __getitem__(self, number: int) -> list[tuple[int, int, int]]:
        """`(row, start, stop)` of each piece of one training row."""
        here = slice(self._offsets[number], self._offsets[number + 1])
        return list(zip(*(column[here].tolist() for column in self._columns), strict=True))
