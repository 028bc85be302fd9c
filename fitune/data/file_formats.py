"""Cuts files of lines and CSV tables into chunks of some megabytes, with true line numbers.

A chunk is small to send to another process and knows how to yield its `records()`: `(number, row)`, where the row is
the line's bytes, a JSON text, a dict, or the RowError that stands in its place.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fitune.data.conversations import RowError
from fitune.errors import UsageError

CHUNK_BYTES = 1 << 20
MAX_ROW_BYTES = 10 << 20
ROWS_PER_TABLE = 2048
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Lines:
    """Whole lines of a file, by position (`end` bytes) or by value; numbered from 1 in the chunk, counted by whoever
    reads chunks in order."""

    start: int
    "byte offset of the first line in the (decompressed) file"
    end: int
    path: Path | None = None
    data: bytes | None = None
    counts_lines = True

    def records(self) -> Iterator[tuple[int, bytes | RowError]]:
        with self.path.open("rb") if self.path else io.BytesIO(self.data) as stream:
            if self.path:
                stream.seek(self.start)
            size = self.end - self.start
            for number, (offset, line) in enumerate(_limited_lines(stream, size), start=1):
                yield number, _decoded(line, self.start + offset)


@dataclass(frozen=True)
class Rows:
    """Rows cut out by the reader, each with the line it starts at."""

    numbers: list[int]
    rows: list[Any]
    counts_lines = False

    def records(self) -> Iterator[tuple[int, Any]]:
        yield from zip(self.numbers, self.rows, strict=True)


@dataclass(frozen=True)
class Table:
    """Rows of an Arrow table or record batch, numbered from `first_row` (1 for the file's first)."""

    first_row: int
    table: Any
    counts_lines = False

    def records(self) -> Iterator[tuple[int, dict | RowError]]:
        rows = self._rows()
        if any(f"{key}:" in str(self.table.schema) for key in _FREE_OBJECTS):
            rows = [_as_before_the_table(row) for row in rows]
        yield from enumerate(rows, start=self.first_row)

    def _rows(self) -> list[dict | RowError]:
        try:
            return self.table.to_pylist()
        except UnicodeDecodeError:
            return [_row_of(self.table.slice(number, 1)) for number in range(self.table.num_rows)]


def _row_of(one) -> dict | RowError:
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError as error:
        return RowError("not_utf8", f"not UTF-8: byte 0x{error.object[error.start]:02x} of a text")


_FREE_OBJECTS = ("tool_calls", "tool_call", "function_call", "tools", "functions")
"Keys of what has other keys in every row. A table has one set of keys for all rows, and fills in null."


def _as_before_the_table(value, fills: bool = False):
    """Without the keys of tool calls and schemas that a table filled in; elements of lists are the row's own."""
    if isinstance(value, list):
        return [_as_before_the_table(one, fills) for one in value]
    if isinstance(value, dict):
        return {
            key: _as_before_the_table(one, fills or key in _FREE_OBJECTS)
            for key, one in value.items()
            if not (fills and one is None)
        }
    return value


Chunk = Lines | Rows | Table


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def chunks_of_lines(source: Path | BinaryIO) -> Iterator[Lines]:
    """Byte ranges of a plain file, which other processes read themselves, or the bytes of a stream."""
    if isinstance(source, Path):
        yield from _byte_ranges(source)
        return
    start, block, size = 0, [], 0
    for offset, line in _limited_lines(source):
        text = line if isinstance(line, bytes) else _OVERSIZED_LINE
        block.append(text)
        size += len(text)
        if size >= CHUNK_BYTES or text is not line:
            yield Lines(start, start + size, data=b"".join(block))
            start, block, size = offset + _length(line), [], 0
    if block:
        yield Lines(start, start + size, data=b"".join(block))


def chunks_of_csv(stream: BinaryIO, name: str, delimiter: str) -> Iterator[Rows]:
    """Rows of a CSV table with a header, as dicts of text; a row is numbered by the line it starts at.

    A header without `delimiter` but with semicolons is one of a spreadsheet that writes them in its place.
    """
    stream = io.BufferedReader(stream)
    header = stream.peek(1 << 16).partition(b"\n")[0]
    if delimiter.encode() not in header and b";" in header:
        delimiter = ";"
    csv.field_size_limit(MAX_ROW_BYTES)
    bad_lines: list[int] = []
    oversized: list[int] = []
    reader = csv.reader(_csv_lines(stream, bad_lines, oversized), delimiter=delimiter, strict=True)
    header, numbers, rows, size = None, [], [], 0
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            said = "a line ends with CR alone; end lines with LF" if "new-line character" in str(error) else error
            raise UsageError(f"{name}:{line}: not valid CSV: {said}") from None
        if fields is None:
            break
        if not fields:
            continue
        if header is None:
            if oversized:
                raise UsageError(f"{name}:{line}: the header has more than {MAX_ROW_BYTES >> 20} MiB")
            if bad_lines:
                raise UsageError(f"{name}:{line}: the header is not UTF-8: byte offset {bad_lines[0]} of the file")
            header = _csv_header(fields, name)
            continue
        numbers.append(line)
        rows.append(_csv_row(header, fields, bad_lines, oversized))
        size += sum(map(len, fields))
        if size >= CHUNK_BYTES:
            yield Rows(numbers, rows)
            numbers, rows, size = [], [], 0
    if rows:
        yield Rows(numbers, rows)


_OVERSIZED_LINE = b"\x00oversized\n"
"Stands for a line over MAX_ROW_BYTES in the bytes of a stream: not JSON, and no text file holds it."


def _byte_ranges(path: Path) -> Iterator[Lines]:
    """Cuts right after a newline, found by reading on from each CHUNK_BYTES; a line of any length is never held."""
    with path.open("rb") as file:
        file_size = file.seek(0, io.SEEK_END)
        start = 0
        while start < file_size:
            file.seek(start + CHUNK_BYTES)
            end = min(start + CHUNK_BYTES, file_size)
            while block := file.read(1 << 16):
                newline = block.find(b"\n")
                if newline >= 0:
                    end += newline + 1
                    break
                end += len(block)
            yield Lines(start, end, path=path)
            start = end


class _Length(int):
    """Bytes of a line over MAX_ROW_BYTES, of which nothing is kept."""

    odd_quotes = False
    "Whether it begins or ends a quoted field of several lines."


def _limited_lines(stream, size: int | None = None) -> Iterator[tuple[int, bytes | _Length]]:
    """`(offset, line)` of each line; in place of a line over MAX_ROW_BYTES its length."""
    offset = 0
    while size is None or offset < size:
        line = stream.readline(MAX_ROW_BYTES + 1)
        if not line:
            return
        length = len(line)
        if length > MAX_ROW_BYTES and not line.endswith(b"\n"):
            quotes = line.count(b'"')
            while more := stream.readline(1 << 20):
                length += len(more)
                quotes += more.count(b'"')
                if more.endswith(b"\n"):
                    break
            line = _Length(length)
            line.odd_quotes = quotes % 2 == 1
        yield offset, line
        offset += length


def _length(line: bytes | _Length) -> int:
    return line if isinstance(line, int) else len(line)


def _decoded(line: bytes | _Length, offset: int) -> str | RowError:
    """The line's text; `offset` is its place in the file, in bytes."""
    if isinstance(line, int) or line == _OVERSIZED_LINE:
        return too_large(line if isinstance(line, int) else None)
    if offset == 0:
        line = line.removeprefix(BOM)
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        place = f"byte {error.start} of the line, byte offset {offset + error.start} of the file"
        return RowError("not_utf8", f"not UTF-8: byte 0x{line[error.start]:02x} at {place}")


def too_large(size: int | None) -> RowError:
    given = f"{size / (1 << 20):.1f} MiB" if size else "a row"
    return RowError("too_large", f"{given} is more than the {MAX_ROW_BYTES >> 20} MiB a row may have")


def _csv_lines(stream: BinaryIO, bad_lines: list[int], oversized: list[int]) -> Iterator[str]:
    """Text lines for csv.reader; bytes that are not UTF-8 become lone surrogates, their offsets go to `bad_lines`.

    A line over the limit becomes a short one that begins or ends a quoted field as it would; its offset goes to
    `oversized`.
    """
    for offset, line in _limited_lines(stream):
        text = line.removeprefix(BOM) if offset == 0 and isinstance(line, bytes) else line
        if isinstance(text, _Length):
            oversized.append(offset)
            text = b'"\n' if text.odd_quotes else b"x\n"
        try:
            yield text.decode()
        except UnicodeDecodeError as error:
            bad_lines.append(offset + error.start)
            yield text.decode(errors="surrogateescape")


def _csv_header(fields: list[str], name: str) -> list[str]:
    repeated = {field for field in fields if fields.count(field) > 1}
    if repeated:
        raise UsageError(f"{name}:1: column {sorted(repeated)[0]!r} is there twice")
    return fields


def _csv_row(header: list[str], fields: list[str], bad_lines: list[int], oversized: list[int]) -> dict | RowError:
    if oversized:
        oversized.clear()
        bad_lines.clear()
        return too_large(None)
    if bad_lines:
        offset = bad_lines[0]
        bad_lines.clear()
        return RowError("not_utf8", f"not UTF-8: byte offset {offset} of the file")
    if len(fields) != len(header):
        return RowError("wrong_type", f"{len(fields)} fields where the header has {len(header)}")
    return dict(zip(header, fields, strict=True))


def jsonl_to_parquet(source: Path, target: Path, rows_per_group: int = 8192) -> None:
    """A .jsonl file that prepare wrote as Parquet, one row group at a time; `tools` stay JSON text."""
    import pyarrow
    import pyarrow.parquet

    schema = _row_schema()
    with source.open(encoding="utf-8") as lines, pyarrow.parquet.ParquetWriter(target, schema) as writer:
        while group := list(itertools.islice(lines, rows_per_group)):
            writer.write_table(pyarrow.Table.from_pylist(list(map(json.loads, group)), schema))


def _row_schema():
    """The Arrow schema of prepare's rows."""
    import pyarrow

    text = pyarrow.string()
    function = pyarrow.struct({"name": text, "arguments": text})
    call = pyarrow.struct({"id": text, "type": text, "function": function})
    names = ("role", "content", "name", "tool_call_id", "reasoning_content")
    message = dict.fromkeys(names, text) | {"tool_calls": pyarrow.list_(call), "train": pyarrow.bool_()}
    return pyarrow.schema({"messages": pyarrow.list_(pyarrow.struct(message)), "tools": text, "text": text})
