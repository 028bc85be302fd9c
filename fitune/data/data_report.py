"""report.json: what was read, what was kept, where it came from; and the same as a table."""

import hashlib
from pathlib import Path

import numpy as np

from fitune.data.packing import Pieces
from fitune.data.prepared import REPORT_VERSION
from fitune.data.reading import Tally
from fitune.data.row_store import RowStore, Selection
from fitune.data.rules import Rules
from fitune.data.source_file import SourceFile
from fitune.data.sources import belongs
from fitune.data.token_report import histogram_chart, packing_report, token_statistics

HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")
"What split to hold out is usually called."


def describe(
    sources,
    tally: Tally,
    store: RowStore,
    selection: Selection,
    rules: Rules,
    packing: bool,
    pieces: Pieces | None,
    global_batch_size: int | None,
) -> dict:
    """The report, but for the template and the tokenizer. `sources` holds `(settings, splits)` pairs.

    `rows_kept` counts different rows; `train_rows` lines of train.jsonl, where a weight may repeat or leave out rows.
    `tokens` and what follows from them are about train.jsonl, and null where no tokenizer was given.
    """
    repeats = selection.train_repeats
    train_tokens = np.repeat(store.tokens, repeats)
    kept = (repeats > 0) | selection.test
    counted = rules.encoder is not None
    report = {
        "version": REPORT_VERSION,
        "rows_in": tally.rows_in,
        "rows_kept": int(kept.sum()),
        "dropped": dict(sorted((tally.counts | selection.dropped).items(), key=lambda item: -item[1])),
        "examples": tally.examples,
        "rows_cut": tally.cut,
        "escaped_control_tokens": tally.escaped,
        "reasoning_dropped": tally.reasoning_dropped,
        "texts": int((store.is_text & kept).sum()),
        "longest_conversation": int(store.tokens[~store.is_text].max(initial=0)) if counted else None,
        "train_rows": int(repeats.sum()),
        "test_rows": int(selection.test.sum()),
        "tokens": token_statistics(train_tokens, np.repeat(store.trained, repeats)) if counted else None,
        "test_tokens": int(store.tokens[selection.test].sum(dtype=np.int64)) if counted else None,
        "max_length": rules.max_length,
        "packing": packing,
        "packed_rows": None,
        "packing_efficiency": None,
        "steps_per_epoch": None,
        "source": _source(sources[0], 0, tally, store),
        "mixed_in": [_source(source, number, tally, store) for number, source in enumerate(sources[1:], start=1)],
    }
    if pieces is not None:
        report |= packing_report(pieces, rules.max_length, global_batch_size)
    return report | {"notes": _notes(report, sources, global_batch_size)}


def print_report(report: dict, console) -> None:
    """The report as a table, on a rich Console."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _lines(report):
        table.add_row(name, escape(value))
    console.print(table)
    if report["tokens"]:
        console.print(histogram_chart(report["tokens"]["histogram"]))
    for note in report["notes"]:
        console.print(f"note: {note}", style="magenta", markup=False, highlight=False)


def _source(source: tuple, number: int, tally: Tally, store: RowStore) -> dict:
    """`sha256` is that of the one file, of the list of the files' sums, or of the rows that a Hub dataset gave."""
    settings, splits = source
    files = [file.name for file in (*splits.train, *splits.test) if isinstance(file, SourceFile)]
    sums = {name: tally.sha256_by_file[name] for name in files}
    if not sums:
        rows = store.hashes[store.source == number]
        sha256, of = hashlib.sha256(rows.tobytes()).hexdigest(), "rows"
    elif len(sums) == 1:
        sha256, of = next(iter(sums.values())), "file"
    else:
        sha256, of = hashlib.sha256("\n".join(sums.values()).encode()).hexdigest(), "files"
    return {
        "dataset": settings.dataset,
        "revision": splits.revision,
        "sha256": sha256,
        "sha256_of": of,
        "files": sums,
        "weight": settings.weight,
        "rows_in": tally.rows_by_source.get(number, 0),
        "test_rows_from": f"its split '{settings.test_split}'" if splits.test else "its training rows, by seed",
    }


def _notes(report: dict, sources, global_batch_size: int | None) -> list[str]:
    notes = []
    for settings, splits in sources:
        if settings.test_split and not splits.test and splits.has_named_splits:
            notes.append(
                f"{settings.dataset} has no split '{settings.test_split}': test rows were taken from the others"
            )
        if splits.ignored:
            names = ", ".join(splits.ignored[:5]) + (", ..." if len(splits.ignored) > 5 else "")
            unread = [Path(Path(file).name) for file in splits.ignored]
            held_out = next((name for name in HELD_OUT if any(belongs(file, name) for file in unread)), None)
            way = f"; --set data.test_split={held_out} holds out {held_out}" if held_out and not splits.test else ""
            notes.append(f"not read, neither train nor test: {names}{way}")
    if report["packed_rows"] and global_batch_size and report["packed_rows"] < global_batch_size:
        notes.append(
            f"packed, the training rows fill {report['packed_rows']:,} rows of {report['max_length']:,} tokens, "
            f"less than one global batch of {global_batch_size:,}"
        )
    if not report["test_rows"]:
        notes.append("no test rows: eval will have nothing to measure")
    if report["tokens"] is None:
        notes.append("no tokenizer was given: tokens were not made, long rows not looked for; train makes them")
    return notes


def _lines(report: dict):
    yield "rows read", f"{report['rows_in']:,}"
    yield "kept", f"{report['rows_kept']:,}"
    for reason, count in report["dropped"].items():
        yield "  dropped", f"{count:,}  {reason}"
    if report["rows_cut"]:
        yield "  cut", f"{report['rows_cut']:,}  after the last answer that fits in max_length"
    if report["escaped_control_tokens"]:
        yield "  escaped", f"{report['escaped_control_tokens']:,}  control tokens"
    if report["reasoning_dropped"]:
        yield "  left out", f"{report['reasoning_dropped']:,}  times the thinking, which the template does not write"
    if report["texts"]:
        yield "  texts", f"{report['texts']:,}  of the rows: all of each is trained, in pieces of max_length"
    yield "train / test", f"{report['train_rows']:,} / {report['test_rows']:,}"
    for source in (report["source"], *report["mixed_in"]):
        revision = f" at {source['revision']}" if source["revision"] else ""
        yield "source", f"{source['dataset']}{revision}, SHA-256 of its {source['sha256_of']} {source['sha256'][:12]}"
    template = report["template"]
    sha256 = f", SHA-256 {template['sha256'][:12]}" if template["sha256"] else ""
    yield "template", f"{template['choice'] or 'none'}{sha256}"
    if tokens := report["tokens"]:
        yield "tokens", f"{tokens['total']:,}, {tokens['trained_share']:.1%} trained"
        yield "tokens per row", f"p50 {tokens['p50']:,}  p95 {tokens['p95']:,}  max {tokens['max']:,}"
    if report["packed_rows"]:
        share = f"{report['packing_efficiency']:.1%} of their positions used"
        yield f"rows of {report['max_length']:,}", f"{report['packed_rows']:,}, {share}"
    if report["steps_per_epoch"]:
        yield "steps per epoch", f"{report['steps_per_epoch']:,}"
