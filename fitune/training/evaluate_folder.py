"""Loss, perplexity and token accuracy of a model's, an adapter's folder on held-out rows, on one device.

Nothing of a run is needed: the rows are tokenised with the folder's own tokenizer and chat template.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from fitune.config.hub import local_folder
from fitune.config.schema import Data
from fitune.data.chat_template import apply_chat_template_choice, read_tokenizer
from fitune.data.file_formats import first_line
from fitune.data.token_file import IGNORED, TokenFile
from fitune.data.tokenise import tokenise_lines
from fitune.errors import UsageError
from fitune.export.adapter import AdapterFile, is_adapter
from fitune.export.chat_record import read_chat_record
from fitune.progress import bar
from fitune.training.evaluate import evaluation_table
from fitune.weights.base_identity import base_fingerprint, base_mismatch, read_base_record, settle_doubt
from fitune.weights.safetensors_files import Checkpoint

Row = tuple[list[int], list[int]]
"Token ids, and the same as labels: IGNORED where nothing is answered."
Scored = tuple[float, int, int]
"Of a row's answer tokens: the sum of their losses in nats, how many were the likeliest, how many there are."


def evaluate_folder(given: Path, data: Path, *, force: bool = False) -> dict:
    """{"model": metrics, "rows": N} of `given` on `data`, a prepared folder or a .jsonl file of the same schema."""
    file = rows_file(data)
    rows = read_rows(file, folder_tokenizer(given), given)
    score = load_scorer(given, force)
    with bar("evaluating", len(rows)) as advance:
        return {"model": metrics(score(row) for row in _counting(rows, advance)), "rows": len(rows)}


def folder_tokenizer(given: Path):
    """Of a model's or an adapter's folder, with its own template. UsageError where it has none."""
    tokenizer = read_tokenizer(given)
    if not tokenizer.chat_template:
        raise UsageError(f"{given}: has no chat template, so answers cannot be told from questions")
    apply_chat_template_choice(tokenizer, "tokenizer")
    return tokenizer


def rows_file(data: Path) -> Path:
    """The held-out rows of a folder that `prepare` wrote, or the file itself. Raises UsageError where there is none."""
    file = data / "test.jsonl" if data.is_dir() else data
    if not file.is_file():
        raise UsageError(f"{file}: no such file; give a folder that prepare wrote, or a .jsonl file")
    return file


def print_evaluation(given: Path, data: Path, *, force: bool) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print_report(evaluate_folder(given, data, force=force))


def print_report(report: dict) -> None:
    Console().print(evaluation_table(report))


def read_rows(file: Path, tokenizer, given: Path) -> list[Row]:
    """Every bad row is named by its line, in a UsageError."""
    record = read_chat_record(given)
    settings = Data(
        dataset=str(file),
        prepared=str(file.parent),
        chat_template="tokenizer",
        system_message=record.system_message if record else None,
    )
    with tempfile.TemporaryDirectory(prefix="fitune-") as scratch:
        target = Path(scratch) / "tokens"
        tokenise_lines(file, target, tokenizer, settings, workers=1)
        tokens = TokenFile(target)
        lengths = enumerate(tokens.lengths().tolist())
        return [tuple(part.tolist() for part in tokens.read(number, 0, length)) for number, length in lengths]


def _counting(rows: list[Row], advance) -> Iterator[Row]:
    for row in rows:
        yield row
        advance()


def metrics(scored) -> dict[str, float]:
    """As `eval` gives them for a run, each token counted once."""
    loss, right, count = (sum(values) for values in zip(*scored, strict=True))
    if not count:
        raise UsageError("no row has an answer")
    mean = loss / count
    return {"loss": mean, "perplexity": math.exp(min(mean, 700)), "token_accuracy": right / count, "tokens": count}


def load_scorer(given: Path, force: bool) -> Callable[[Row], Scored]:
    """The model of a folder, by transformers and PEFT; a QLoRA adapter over its base in NF4, as it was trained."""
    model = _load(given, force)
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


def _load(given: Path, force: bool):
    from transformers import AutoModelForCausalLM

    options = {"dtype": "auto", "use_safetensors": True}
    options["device_map"] = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = given
    if is_adapter(given):
        folder, record = _base_of(given, force), read_base_record(given)
        if record is not None and record.computed_in == "nf4" and not _is_quantised(folder):
            options["quantization_config"] = _nf4()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: cannot be loaded: {first_line(error)}") from None
    if folder != given:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, given)
    return model.eval()


def _base_of(adapter: Path, force: bool) -> Path:
    with AdapterFile(adapter) as file:
        folder = local_folder(*file.named_base("merge it with --base MODEL and give that folder"))
    record, doubt = read_base_record(adapter), None
    if record is not None:
        with Checkpoint(folder) as checkpoint:
            doubt = base_mismatch(record, base_fingerprint(checkpoint))
    settle_doubt(folder, adapter, doubt, recorded=record is not None, force=force)
    return folder


def _is_quantised(folder: Path) -> bool:
    return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _nf4():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
