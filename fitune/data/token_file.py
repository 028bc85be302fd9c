"""SPLIT.tokens.arrow: the tokens of each line of SPLIT.jsonl, memory-mapped by whoever reads it.

An Arrow file with the columns `input_ids`, `trained` (start and stop of each run of tokens that is trained, one after
the other) and `text` (whether the line is a plain text, which may be split anywhere).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fitune.data.arrow_columns import column, lists

ROWS_PER_BATCH = 1024
IGNORED = -100
"The label of a token that is not trained, as PyTorch's cross entropy has it."


@dataclass(frozen=True)
class TokenBatch:
    """Up to ROWS_PER_BATCH rows."""

    ids: np.ndarray
    "int32, of all rows"
    tokens: np.ndarray
    "of each row"
    edges: np.ndarray
    "int32, start and stop of each trained run of all rows, counted from the row's first token"
    runs: np.ndarray
    "trained runs of each row"
    is_text: np.ndarray
    "bool"


def write_tokens(path: Path, batches: Iterable[TokenBatch]) -> None:
    """Every batch but the last must hold ROWS_PER_BATCH rows."""
    import pyarrow

    schema = pyarrow.schema(
        {
            "input_ids": pyarrow.list_(pyarrow.int32()),
            "trained": pyarrow.list_(pyarrow.int32()),
            "text": pyarrow.bool_(),
        }
    )
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            columns = [
                lists(batch.ids, batch.tokens),
                lists(batch.edges, 2 * batch.runs),
                column(batch.is_text),
            ]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))


class TokenFile:
    """Rows of a file that `write_tokens` wrote, read where they lie. Raises ValueError for another kind of file."""

    def __init__(self, path: Path):
        import pyarrow

        self.path = path
        try:
            self._reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
            batches = self._reader.num_record_batches
            last = self._reader.get_batch(batches - 1).num_rows if batches else 0
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path}: not a file of tokens: {error}") from None
        self._rows = max(0, batches - 1) * ROWS_PER_BATCH + last
        self._batch = lru_cache(maxsize=16)(self._read_batch)

    def __len__(self) -> int:
        return self._rows

    def __reduce__(self):
        return TokenFile, (self.path,)

    def read(self, row: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """`(ids, labels)`, both int64 [stop - start], of the tokens from `start` to `stop` of a row.

        The first has no label: in a packed row it would be learned from the end of what stands before it.
        """
        ids, id_offsets, edges, edge_offsets, _ = self._batch(row // ROWS_PER_BATCH)
        here = row % ROWS_PER_BATCH
        tokens = ids[id_offsets[here] : id_offsets[here + 1]].astype(np.int64)
        labels = np.full(len(tokens), IGNORED, np.int64)
        for first, end in edges[edge_offsets[here] : edge_offsets[here + 1]].reshape(-1, 2):
            labels[first:end] = tokens[first:end]
        labels[start] = IGNORED
        return tokens[start:stop], labels[start:stop]

    def ids(self, row: int) -> np.ndarray:
        """int32, all tokens of a row."""
        ids, offsets, *_ = self._batch(row // ROWS_PER_BATCH)
        return ids[offsets[row % ROWS_PER_BATCH] : offsets[row % ROWS_PER_BATCH + 1]]

    def lengths(self) -> np.ndarray:
        """Tokens of each row. Looks at every batch, not at the tokens."""
        return self._column(lambda batch: np.diff(batch[1]), np.int32)

    def is_text(self) -> np.ndarray:
        return self._column(lambda batch: batch[4], bool)

    def _column(self, of_batch, dtype) -> np.ndarray:
        parts = [of_batch(self._read_batch(number)) for number in range(self._reader.num_record_batches)]
        return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)

    def _read_batch(self, number: int) -> tuple:
        batch = self._reader.get_batch(number)
        ids, trained, is_text = batch.columns
        return (
            ids.values.to_numpy(),
            ids.offsets.to_numpy(),
            trained.values.to_numpy(),
            trained.offsets.to_numpy(),
            is_text.to_numpy(zero_copy_only=False),
        )
