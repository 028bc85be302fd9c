"""The stage `prepare`: any usual data in; readable rows, their tokens and a report out, every bad row named."""

import itertools
import json
from pathlib import Path

import numpy as np

from fitune.config.base_model import check_vocabulary
from fitune.config.host_limits import usable_cores
from fitune.config.recipe import Data, Source
from fitune.data import chat_template
from fitune.data.chat_renderer import ChatRenderer
from fitune.data.data_report import describe, print_report
from fitune.data.file_formats import jsonl_to_parquet
from fitune.data.packing import Pieces, lay_out, write_layout
from fitune.data.prepared import REPORT, SPLITS, chosen_by, describe_files
from fitune.data.reading import Tally, read_all, refuse_problems
from fitune.data.rendering import render_row
from fitune.data.row_filter import check_filter
from fitune.data.row_formats import FORMATS, OPTIONAL_COLUMNS
from fitune.data.row_store import RowStore, Selection
from fitune.data.rules import Rules, rules_for, rules_without_tokenizer
from fitune.data.sources import Splits, open_source
from fitune.data.token_file import write_tokens
from fitune.data.token_report import print_preview, progress_line
from fitune.errors import UsageError, nearest
from fitune.output_folder import new_folder

WRITTEN = {REPORT} | {
    f"{split}.{kind}" for split in SPLITS for kind in ("jsonl", "tokens.arrow", "packed.arrow", "parquet")
}


def prepare(
    data: Data,
    output: Path,
    *,
    tokenizer=None,
    template_choice: str | None = None,
    max_length: int | None = None,
    packing: bool = True,
    global_batch_size: int | None = None,
    seed: int = 42,
    drop_invalid: bool = False,
    escape_control_tokens: bool = False,
    long_rows: str | None = None,
    format: str | None = None,
    parquet: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    preview: int = 0,
    console=None,
    asked: dict | None = None,
) -> dict:
    """Write `output`/train.jsonl, test.jsonl, their tokens and report.json; return the report.

    Flags of `fitune prepare`, in its words, and what it takes from the recipe:

    --tokenizer (`tokenizer`)          folder or Hub id, or a transformers tokenizer; None: no tokens are written
    --template (`template_choice`)     instead of the recipe's `chat_template`
    --max-length (`max_length`)        tokens a row may have; longer rows follow `long_rows`
    `packing`                          whether rows will be packed
    `global_batch_size`                rows per optimizer step
    `seed`                             picks the test rows and those of fractional weights
    --drop-invalid                     go on without the rows that cannot be used, as the recipe's `invalid_rows: drop`
    --escape-control-tokens            break up control tokens in texts with a space instead of refusing them
    --long-rows refuse|drop|cut        instead of the recipe's `long_rows`
    --format NAME                      messages, sharegpt, alpaca, prompt_completion; instead of the recipe's `format`
    --parquet                          also write train.parquet and test.parquet
    --overwrite                        replace `output`
    --workers                          processes; default: all cores
    --preview N                        print the first N rows as the model sees them
    `asked`                            what was typed, for `report.json`: see `fitune.data.prepare_command`

    Each line of the .jsonl files is `{"messages": [{"role", "content", ...}], "tools"?: JSON text}`. Raises UsageError
    for rows that cannot be used (first 20 of each reason as `file:line: reason`), sources that cannot be read, an
    existing `output`, no rows left or fewer than one global batch; nothing is left behind then.
    """
    output = Path(output)
    _refuse_existing(output, overwrite)
    _refuse_own_source(output, [data.dataset, *(source.dataset for source in data.mix)])
    choice = template_choice or data.chat_template
    tokenizer = _load_tokenizer(tokenizer, choice)
    if preview and tokenizer is None:
        raise UsageError("--preview needs the tokenizer: it shows rows as the model sees them; pass --tokenizer")
    how = {"escape_control_tokens": escape_control_tokens, "train_on": data.train_on}
    if tokenizer is None:
        rules = rules_without_tokenizer(choice, **how)
    else:
        how |= {"max_length": max_length, "long_rows": long_rows or data.long_rows, "reasoning": data.reasoning}
        rules = rules_for(tokenizer, **how)
    sources = _open_sources(data, format)
    with new_folder(output, replace=overwrite) as folder:
        store = RowStore(folder)
        with progress_line(console) as show_progress:
            tally = read_all(sources, rules, store, workers or usable_cores(), show_progress)
        refuse_problems(tally, rules, drop_invalid or data.invalid_rows == "drop")
        fractions = [None if splits.test else data.test_fraction for _, splits in sources]
        selection = store.select(seed, [source.weight for source, _ in sources], fractions)
        _refuse_too_few(sources, selection, tally, global_batch_size)
        pieces = _write(store, selection, folder, rules, packing)
        report = describe(sources, tally, store, selection, rules, packing, pieces, global_batch_size) | {
            "test_fraction": data.test_fraction if any(fractions) else None,
            "seed": seed,
            "chosen_by": chosen_by(data),
            "working_folder": str(Path.cwd()),
            "asked": asked or {},
            "template": {"choice": choice, "sha256": _template_sha256(choice, tokenizer)},
            "tokenizer": {"sha256": chat_template.tokenizer_hash(tokenizer) if tokenizer else None},
            "system_message": data.system_message,
            "train_on": data.train_on,
            "files": describe_files(folder),
        }
        if parquet:
            for split in SPLITS:
                jsonl_to_parquet(folder / f"{split}.jsonl", folder / f"{split}.parquet")
        (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if console:
        print_report(report, console)
        if preview:
            _print_preview(output, preview, rules, console)
    return report


def _refuse_existing(output: Path, overwrite: bool) -> None:
    """`overwrite` replaces what an earlier `prepare` wrote, and nothing else."""
    if not output.exists() and not output.is_symlink():
        return
    if output.is_file():
        raise UsageError(f"{output}: is a file; choose a folder")
    if not overwrite:
        raise UsageError(f"{output}: already exists; remove it, choose another folder, or pass --overwrite")
    if not (output / REPORT).is_file():
        raise UsageError(f"{output}: exists and was not written by prepare (no report.json); choose another folder")
    if strangers := sorted(path.name for path in output.iterdir() if path.name not in WRITTEN):
        raise UsageError(f"{output}: holds {strangers[0]}, which prepare did not write; choose another folder")


def _refuse_own_source(output: Path, sources: list[str]) -> None:
    """Raises UsageError where rows would be read from the folder that they replace."""
    for source in sources:
        place = Path(source).resolve()
        if output.exists() and output.resolve() in (place, *place.parents):
            raise UsageError(f"{source} lies in {output}, which would be replaced; choose another --output")


def _load_tokenizer(tokenizer, choice: str):
    """A transformers tokenizer that holds the training template, or None."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, (str, Path)):
        check_vocabulary(Path(tokenizer))
        tokenizer = chat_template.read_tokenizer(tokenizer)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UsageError("tokenizer: a fast tokenizer (with a tokenizer.json) is needed")
    chat_template.apply_chat_template_choice(tokenizer, choice)
    return tokenizer


def _open_sources(data: Data, format: str | None) -> list[tuple[Data | Source, Splits]]:
    """Every source of the recipe with its splits opened; `format` stands in for that of `data.dataset`."""
    if format is not None:
        if format not in FORMATS:
            raise UsageError(f"--format {format}: unknown format{nearest(format, FORMATS)}")
        data = data.model_copy(update={"format": format})
    known = dict.fromkeys(itertools.chain(*FORMATS.values(), *OPTIONAL_COLUMNS.values()))
    for source in (data, *data.mix):
        check_filter(source.keep)
        for name in source.columns:
            if name not in known:
                raise UsageError(f"columns: unknown column '{name}'{nearest(name, known)}")
    return [
        (source, open_source(source.dataset, source.revision, source.train_split, source.test_split))
        for source in (data, *data.mix)
    ]


def _refuse_too_few(sources, selection: Selection, tally: Tally, global_batch_size: int | None) -> None:
    if not tally.rows_in:
        raise UsageError(f"{', '.join(source.dataset for source, _ in sources)}: no rows")
    train, test = int(selection.train_repeats.sum()), int(selection.test.sum())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in (tally.counts | selection.dropped).items())
    left = f"{tally.rows_in:,} rows were read" + (f", dropped: {reasons}" if reasons else "")
    if not train:
        raise UsageError(f"no rows left to train on ({left}; {test:,} went to test)")
    if global_batch_size and train < global_batch_size:
        raise UsageError(
            f"{train:,} training rows are fewer than one global batch of {global_batch_size:,} ({left}); "
            "add rows or lower global_batch_size"
        )


def _write(store: RowStore, selection: Selection, folder: Path, rules: Rules, packing: bool) -> Pieces | None:
    """Lines, tokens and layout of both splits; the training rows' layout, None where nothing was tokenised."""
    layouts = {}
    for split, repeats in (("train", selection.train_repeats), ("test", selection.test.astype(np.uint16))):
        store.write(folder / f"{split}.jsonl", repeats)
        if rules.encoder is not None:
            write_tokens(folder / f"{split}.tokens.arrow", store.token_batches(repeats))
            if rules.max_length:
                order = store.order(repeats)
                layouts[split] = lay_out(store.tokens[order], store.is_text[order], rules.max_length, packing)
                write_layout(folder / f"{split}.packed.arrow", layouts[split])
    store.remove()
    return layouts.get("train")


def _template_sha256(choice: str, tokenizer) -> str | None:
    """None where only the tokenizer, which was not given, knows its template."""
    if tokenizer is not None:
        return chat_template.template_hash(tokenizer)
    return None if choice == "tokenizer" else chat_template.sha256(chat_template.training_template(choice))


def _print_preview(output: Path, count: int, rules: Rules, console) -> None:
    renderer = ChatRenderer(rules.template, rules.special_tokens)
    with (output / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, count)]
    print_preview([render_row(renderer, row, rules.train_on) for row in rows], rules.encoder.tokenizer, console)
