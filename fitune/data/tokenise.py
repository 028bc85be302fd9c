"""The tokens of a .jsonl file in prepare's own schema that has none beside it: written by hand, or without --tokenizer.

Its rows are checked as `prepare` checks them; nothing is dropped, cut or moved: line n of the file is row n.
"""

import tempfile
from pathlib import Path

import numpy as np

from fitune.config.recipe import Data
from fitune.data.hub_dataset import Splits
from fitune.data.reading import read_all, refuse_problems
from fitune.data.row_store import RowStore
from fitune.data.rules import rules_for
from fitune.data.source_file import open_file
from fitune.data.token_file import write_tokens


def tokenise_lines(source: Path, target: Path, tokenizer, data: Data, workers: int) -> None:
    """Writes `target`. `tokenizer`: a transformers tokenizer that holds the training template.

    Of the recipe's `data` only what is trained and rendered counts; the lines are of prepare's own format.

    Raises UsageError that names every bad row by its line.
    """
    rules = rules_for(tokenizer, train_on=data.train_on, reasoning=data.reasoning, own_lines=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        store = RowStore(Path(scratch))
        settings = Data(dataset=str(source), prepared=str(source.parent))
        tally = read_all([(settings, Splits([open_file(source)], []))], rules, store, workers)
        refuse_problems(tally, rules, drop_invalid=False)
        write_tokens(target, store.token_batches(np.ones(len(store.tokens), np.uint16)))
