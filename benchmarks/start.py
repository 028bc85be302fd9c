"""How long `train` takes from prepared data to its first row: mapping token files of any number of rows.

    python benchmarks/start.py --rows 1000 1000000 --json FILE

The files are written as `prepare` writes them, with random ids in place of text, 64 tokens a row, packed to 3,072. CPU
seconds, so that a busy machine counts as little as can be; memory is what this process has beyond what it had before,
without mapped files. What `train` does before that (reading the tokenizer, its hash) has nothing to do with rows.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
TOKENS, MAX_LENGTH, ROWS_READ = 64, 3072, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--json", help="also write the figures here")
    arguments = parser.parse_args()
    results = []
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), rows)
            results.append({"rows": rows} | start(Path(folder)))
        print(json.dumps(results[-1]), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def write_files(folder: Path, rows: int) -> None:
    from fitune.data.packing import lay_out, write_layout
    from fitune.data.token_file import ROWS_PER_BATCH, TokenBatch, write_tokens

    draw = np.random.default_rng(0)

    def batches():
        for first in range(0, rows, ROWS_PER_BATCH):
            count = min(ROWS_PER_BATCH, rows - first)
            edges = np.tile(np.array([TOKENS // 2, TOKENS], np.int32), count)
            ids = draw.integers(0, 100_000, count * TOKENS, np.int32)
            yield TokenBatch(ids, np.full(count, TOKENS), edges, np.ones(count, np.int64), np.zeros(count, bool))

    write_tokens(folder / "train.tokens.arrow", batches())
    write_layout(folder / "train.packed.arrow", lay_out(np.full(rows, TOKENS), np.zeros(rows, bool), MAX_LENGTH, True))


def start(folder: Path) -> dict:
    """CPU seconds to the first row, milliseconds for each of ROWS_READ rows drawn by a seed, MiB that it took."""
    from prepare import tree_memory

    from fitune.data.dataset import TokenisedRows
    from fitune.data.packing import Layout
    from fitune.data.token_file import TokenFile

    before, begin = tree_memory(os.getpid()), time.process_time()
    tokens, layout = TokenFile(folder / "train.tokens.arrow"), Layout(folder / "train.packed.arrow")
    rows = TokenisedRows(tokens, layout, packing=True)
    rows[0]
    first = time.process_time()
    draw = random.Random(0)
    for _ in range(ROWS_READ):
        rows[draw.randrange(len(rows))]
    read = time.process_time()
    return {
        "packed_rows": len(rows),
        "map_and_first_row_s": round(first - begin, 4),
        "row_ms": round((read - first) / ROWS_READ * 1000, 3),
        "memory_mib": (tree_memory(os.getpid()) - before) >> 20,
    }


if __name__ == "__main__":
    main()
