"""The good rows between reading and writing: their texts and tokens on disk, some 45 bytes about each in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fitune.data.row_checks import HASH_BYTES, Outcome
from fitune.data.token_file import ROWS_PER_BATCH, TokenBatch

COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class Selection:
    """Which rows become train.jsonl and test.jsonl."""

    train_repeats: np.ndarray
    "times each row is written to train.jsonl, uint16"
    test: np.ndarray
    "bool"
    dropped: dict[str, int]


class RowStore:
    """Rows in the order they were read. `close()` turns the lists into arrays, one entry per row."""

    def __init__(self, folder: Path):
        self._rows, self._ids, self._edges = (folder / name for name in ("rows", "ids", "edges"))
        self._files = [path.open("wb") for path in (self._rows, self._ids, self._edges)]
        self._sizes, self._hashes, self._tokens, self._trained, self._runs, self._is_text = [], [], [], [], [], []
        self._source_of_block, self._is_test_of_block = [], []

    def add(self, outcome: Outcome, source: int, is_test: bool) -> None:
        for file, data in zip(self._files, (outcome.text, outcome.ids, outcome.edges.tobytes()), strict=True):
            file.write(data)
        self._sizes.append(outcome.sizes)
        self._hashes.append(np.frombuffer(outcome.hashes, np.uint64).reshape(-1, HASH_BYTES // 8))
        self._tokens.append(outcome.tokens)
        self._trained.append(outcome.trained)
        self._runs.append(outcome.runs)
        self._is_text.append(outcome.is_text)
        self._source_of_block.append(source)
        self._is_test_of_block.append(is_test)

    def close(self) -> None:
        for file in self._files:
            file.close()
        rows_of_block = [len(sizes) for sizes in self._sizes]
        self.sizes = _joined(self._sizes, np.uint32)
        self.tokens = _joined(self._tokens, np.uint32)
        self.trained = _joined(self._trained, np.uint32)
        self.runs = _joined(self._runs, np.uint32)
        self.is_text = _joined(self._is_text, bool)
        self.hashes = np.concatenate(self._hashes) if self._hashes else np.empty((0, 2), np.uint64)
        self.source = np.repeat(np.array(self._source_of_block, np.uint16), rows_of_block)
        self.is_test = np.repeat(np.array(self._is_test_of_block, bool), rows_of_block)
        self._sizes = self._hashes = self._tokens = self._trained = self._runs = self._is_text = None

    def remove(self) -> None:
        for path in (self._rows, self._ids, self._edges):
            path.unlink()

    def select(self, seed: int, weights: list[float], split_fraction: list[float | None]) -> Selection:
        """Exact duplicates out, the test rows chosen, the sources weighed.

        `weights` and `split_fraction` have one entry per source; a fraction takes that share of the source's rows,
        at least one, as test rows.
        """
        first, shared = _first_occurrences(self.hashes, self.is_test)
        chance = _chance(self.hashes, seed)
        test = self.is_test & first
        for source, fraction in enumerate(split_fraction):
            if fraction is not None:
                rows = np.flatnonzero(first & (self.source == source))
                count = max(1, round(len(rows) * fraction)) if len(rows) > 1 else 0
                test[rows[np.argsort(chance[rows], kind="stable")[:count]]] = True
        in_train = first & ~test & ~self.is_test
        weight_of_row = np.array(weights)[self.source]
        whole = np.floor(weight_of_row)
        draw = _chance(self.hashes, seed + 1)
        repeats = np.where(in_train, whole + (draw < weight_of_row - whole), 0).astype(np.uint16)
        dropped = {
            "duplicate": int((~first & ~shared).sum()),
            "shared_with_test": int(shared.sum()),
            "not_sampled": int((in_train & (repeats == 0)).sum()),
        }
        return Selection(repeats, test, {reason: count for reason, count in dropped.items() if count})

    def write(self, path: Path, repeats: np.ndarray) -> None:
        """The rows with `repeats` > 0, in order; then once more those with `repeats` > 1, and so on."""
        texts, bounds = _mapped(self._rows, np.uint8), _bounds(self.sizes)
        with path.open("wb", buffering=COPY_BYTES) as output:
            for rows in self._batches(repeats):
                output.writelines(_runs(texts, rows, bounds))

    def token_batches(self, repeats: np.ndarray) -> Iterator[TokenBatch]:
        """The tokens of the same rows in the same order."""
        ids, id_bounds = _mapped(self._ids, np.int32), _bounds(self.tokens)
        edges, edge_bounds = _mapped(self._edges, np.int32), _bounds(2 * self.runs)
        for rows in self._batches(repeats):
            yield TokenBatch(
                np.concatenate(_runs(ids, rows, id_bounds)),
                self.tokens[rows],
                np.concatenate(_runs(edges, rows, edge_bounds)),
                self.runs[rows],
                self.is_text[rows],
            )

    def _batches(self, repeats: np.ndarray) -> Iterator[np.ndarray]:
        """The numbers of ROWS_PER_BATCH rows at a time, in order."""
        order = self.order(repeats)
        for first in range(0, len(order), ROWS_PER_BATCH):
            yield order[first : first + ROWS_PER_BATCH]

    @staticmethod
    def order(repeats: np.ndarray) -> np.ndarray:
        """The rows' numbers, as `write` writes them."""
        passes = [np.flatnonzero(repeats > times) for times in range(int(repeats.max(initial=0)))]
        return np.concatenate(passes or [np.empty(0, np.int64)])


def _mapped(path: Path, dtype) -> np.ndarray:
    """The file's values, read when they are looked at."""
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)


def _bounds(sizes: np.ndarray) -> np.ndarray:
    """Where each row's values begin, and where the last one's end."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _runs(values: np.ndarray, rows: np.ndarray, bounds: np.ndarray) -> list[np.ndarray]:
    """The values of `rows`, ascending or not, in as few slices as there are runs of neighbours."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    first, last = rows[np.concatenate([[0], breaks])], rows[np.concatenate([breaks - 1, [-1]])]
    return [values[start:end] for start, end in zip(bounds[first].tolist(), bounds[last + 1].tolist(), strict=True)]


def _first_occurrences(hashes: np.ndarray, is_test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two bool arrays: rows seen for the first time (test rows come before train rows), and train rows that a test
    row holds too."""
    first, shared = np.zeros(len(hashes), bool), np.zeros(len(hashes), bool)
    if not len(hashes):
        return first, shared
    order = np.lexsort((~is_test, hashes[:, 1], hashes[:, 0]))
    in_order = hashes[order]
    starts_group = np.ones(len(order), bool)
    starts_group[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    first[order] = starts_group
    group_has_test = is_test[order[starts_group]][np.cumsum(starts_group) - 1]
    shared[order] = group_has_test & ~is_test[order]
    return first, shared


def _chance(hashes: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each row that depends on its content and the seed alone (splitmix64's finalizer)."""
    z = hashes[:, 0] ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) / 2.0**64


def _joined(arrays: list[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)
