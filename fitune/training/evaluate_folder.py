"""Loss, perplexity and token accuracy of a model's, an adapter's folder on held-out rows, on one device.

Nothing of a run is needed: the rows are tokenised with the folder's own tokenizer and chat template.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from fitune.config.recipe import Data
from fitune.data.chat_template import apply_own_chat_template
from fitune.data.prepared import SPLITS, read_report
from fitune.data.token_file import IGNORED, TokenFile
from fitune.data.tokenise import tokenise_lines
from fitune.errors import UsageError
from fitune.progress import bar
from fitune.training.evaluate import evaluation_table
from fitune.training.given_model import GivenModel
from fitune.training.load_given import load_plain

Row = tuple[list[int], list[int]]
"Token ids, and the same as labels: IGNORED where nothing is answered."
Scored = tuple[float, int, int]
"Of a row's answer tokens: the sum of their losses in nats, how many were the likeliest, how many there are."


def evaluate_folder(given: GivenModel, data: Path) -> dict:
    """{"model": metrics, "rows": N} on `data`, a prepared folder or a .jsonl file of the same schema."""
    with tempfile.TemporaryDirectory(prefix="fitune-") as scratch:
        return _evaluate(given, tokenise(rows_file(data), given, Path(scratch)))


def _evaluate(given: GivenModel, tokens: TokenFile) -> dict:
    rows = read_rows(tokens)
    score = load_scorer(given)
    with bar("evaluating", len(rows)) as advance:
        return {"model": metrics(score(row) for row in _counting(rows, advance)), "rows": len(rows)}


def rows_file(data: Path) -> Path:
    """The held-out rows of a folder that `prepare` wrote, or the file itself. Raises UsageError where there is none."""
    file = data / "test.jsonl" if data.is_dir() else data
    if not file.is_file():
        raise UsageError(f"{file}: no such file; give a folder that prepare wrote, or a .jsonl file")
    return file


def print_evaluation(given: GivenModel, tokens: TokenFile) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    print_report(_evaluate(given, tokens))


def print_report(report: dict) -> None:
    Console().print(evaluation_table(report))


def tokenise(file: Path, given: GivenModel, folder: Path) -> TokenFile:
    """The rows by the model's tokenizer and template, written to `folder`. UsageError with the line of every bad row,
    and for a template that fails or does not say which tokens are answers."""
    tokenizer = given.tokenizer()
    try:
        apply_own_chat_template(tokenizer)
    except UsageError as error:
        raise UsageError(f"{given.folder}: {error}") from None
    settings = Data(
        dataset=str(file),
        prepared=str(file.parent),
        chat_template="tokenizer",
        system_message=given.system_message,
        train_on=_answers_that_count(file),
    )
    target = folder / "rows.tokens.arrow"
    tokenise_lines(file, target, tokenizer, settings, workers=1)
    return TokenFile(target)


def _answers_that_count(file: Path) -> str:
    """`train_on` of a folder's rows, as `prepare` was told; of a file from elsewhere all."""
    report = read_report(file.parent) if file.stem in SPLITS else None
    return report["train_on"] if report else "all"


def longest_row(tokens: TokenFile) -> int:
    """In tokens."""
    return max(tokens.lengths().tolist(), default=1)


def read_rows(tokens: TokenFile) -> list[Row]:
    lengths = enumerate(tokens.lengths().tolist())
    return [tuple(part.tolist() for part in tokens.read(number, 0, length)) for number, length in lengths]


def _counting(rows: list[Row], advance) -> Iterator[Row]:
    for row in rows:
        yield row
        advance()


def metrics(scored) -> dict[str, float]:
    """As `eval` gives them for a run, each token counted once."""
    loss, right, count = (sum(values) for values in zip((0.0, 0, 0), *scored, strict=True))
    if not count:
        raise UsageError("no row has an answer")
    mean = loss / count
    return {"loss": mean, "perplexity": math.exp(min(mean, 700)), "token_accuracy": right / count, "tokens": count}


def load_scorer(given: GivenModel) -> Callable[[Row], Scored]:
    """The model of a folder, by transformers and PEFT, with weights as they are stored."""
    model = load_plain(given)
    device = next(model.parameters()).device

    @torch.no_grad()
    def score(row: Row) -> Scored:
        ids, labels = (torch.tensor(part, device=device) for part in row)
        answered = labels[1:] != IGNORED
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1][answered].float()
        targets = labels[1:][answered]
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return losses.item(), int((logits.argmax(-1) == targets).sum()), len(targets)

    return score
