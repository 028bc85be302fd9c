"""What prepare says about tokens: their distribution, how well rows pack, the preview."""

import itertools
import math
import time
from contextlib import contextmanager

import numpy as np

from fitune.columns import printable
from fitune.data.packing import Pieces
from fitune.data.token_encoder import trained_tokens


def token_statistics(tokens: np.ndarray, trained: np.ndarray) -> dict:
    """Over the training rows. `histogram` maps the upper edge of a power-of-two bin to its number of rows."""
    total = int(tokens.sum(dtype=np.int64))
    edges = 2 ** np.ceil(np.log2(np.maximum(tokens, 1))).astype(np.int64)
    bins, counts = np.unique(edges, return_counts=True)
    trained_total = int(trained.sum(dtype=np.int64))
    return {
        "total": total,
        "trained": trained_total,
        "trained_share": round(trained_total / total, 4) if total else 0.0,
        "mean": round(total / len(tokens), 1) if len(tokens) else 0.0,
        "p50": _percentile(tokens, 50),
        "p95": _percentile(tokens, 95),
        "max": int(tokens.max(initial=0)),
        "histogram": {str(edge): int(count) for edge, count in zip(bins, counts, strict=True)},
    }


def packing_report(pieces: Pieces, max_length: int, global_batch_size: int | None) -> dict:
    """Rows as the model sees them, the share of their positions that hold a token, optimizer steps per epoch."""
    rows, used = pieces.rows, int((pieces.stop - pieces.start).sum(dtype=np.int64))
    return {
        "packed_rows": rows,
        "packing_efficiency": round(used / (rows * max_length), 4) if rows else 0.0,
        "steps_per_epoch": math.ceil(rows / global_batch_size) if global_batch_size else None,
    }


def histogram_chart(histogram: dict[str, int], width: int = 40) -> str:
    most = max(histogram.values(), default=1)
    lines = (
        f"{'<= ' + format(int(edge), ','):>12} {'█' * max(1, round(width * count / most))} {count:,}"
        for edge, count in histogram.items()
    )
    return "\n".join(("tokens per row", *lines))


@contextmanager
def progress_line(console):
    """`show(rows, file_name)` for one line on a terminal, rewritten at most twice a second; None elsewhere.

    Redrawn by the caller and not by a thread: worker processes are forked meanwhile.
    """
    if console is None or not console.is_terminal:
        yield None
        return
    from rich.live import Live

    with Live(console=console, auto_refresh=False, transient=True) as live:
        begin = drawn = time.monotonic()

        def show(rows: int, file_name: str) -> None:
            nonlocal drawn
            now = time.monotonic()
            if now - drawn > 0.5:
                drawn = now
                live.update(f"{rows:,} rows, {rows / (now - begin):,.0f} a second, in {file_name}", refresh=True)

        yield show


def print_preview(rows: list[tuple[str, list[tuple[int, int]]]], tokenizer, console) -> None:
    """Rendered conversations with the tokens that are trained in green, the others dim; without colours, in ⟦ ⟧.

    `rows` holds `(text, spans)` of ChatRenderer.render; `tokenizer` a tokenizers.Tokenizer, which decides where a
    token begins: one that straddles the edge of a span shows in the colour it is trained with.
    """
    from rich.text import Text

    coloured = console.color_system and not console.no_color
    for number, (text, spans) in enumerate(rows, start=1):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        trained = np.zeros(len(text), bool)
        count = 0
        for first, stop in trained_tokens(encoding.offsets, spans):
            trained[encoding.offsets[first][0] : encoding.offsets[stop - 1][1]] = True
            count += stop - first
        shown_as = "green" if coloured else "in ⟦ ⟧"
        console.rule(f"row {number}: {len(encoding)} tokens, {count} of them trained ({shown_as})")
        edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(text)]
        shown = Text()
        for start, end in itertools.pairwise(edges):
            part = printable(text[start:end])
            part = part if coloured or not trained[start] else f"⟦{part}⟧"
            shown.append(part, style="bold green" if trained[start] else "dim")
        console.print(shown, soft_wrap=True)  # line breaks of the text only


def _percentile(values: np.ndarray, percent: float) -> int:
    return int(np.percentile(values, percent, method="higher")) if len(values) else 0
