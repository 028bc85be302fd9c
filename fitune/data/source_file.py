"""One local file of rows: what kind it is, by its name and its first bytes, and its rows in bounded chunks."""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fitune.data.file_formats import (
    BOM,
    MAX_ROW_BYTES,
    ROWS_PER_TABLE,
    Chunk,
    Table,
    chunks_of_csv,
    chunks_of_lines,
    first_line,
)
from fitune.data.json_stream import Member, SeveralValues, chunks_of_json, members_of_object
from fitune.errors import UsageError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
}
COMPRESSED = (".gz", ".zst", ".zstd")
_IS_INSTEAD = {
    ".xlsx": "an Excel file; save it as CSV",
    ".xls": "an Excel file; save it as CSV",
    ".ods": "a spreadsheet; save it as CSV",
    ".zip": "an archive; unpack it and give the folder",
    ".tar": "an archive; unpack it and give the folder",
    ".tgz": "an archive; unpack it and give the folder",
    ".pkl": "a pickle, which can run code; write its rows as JSONL or Parquet",
    ".pt": "a pickle, which can run code; write its rows as JSONL or Parquet",
    ".txt": 'plain text; write one {"text": ...} for each document as JSONL',
    ".md": 'plain text; write one {"text": ...} for each document as JSONL',
}
_PLAIN_TEXT = (".txt", ".md")
_FIRST_BYTES = ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow"))
_TURN_KEYS = ("role", "from")


@dataclass(frozen=True)
class SourceFile:
    """One local file of rows."""

    path: Path
    kind: str
    "jsonl, json, parquet, arrow, csv or tsv"
    compression: str | None
    "gzip, zstd or None; found by the file's first bytes"
    lists: tuple[str, ...] = ()
    "Of a JSON file that is one object, the keys under which it has lists of rows."
    key: str | None = None
    "Which of them is read."

    @property
    def name(self) -> str:
        return str(self.path)

    def chunks(self) -> Iterator[Chunk]:
        """The file's rows in order, in pieces of some megabytes. Raises UsageError for a file that cannot be read."""
        try:
            _refuse_utf16(self)
            yield from _READERS[self.kind](self)
        except (OSError, EOFError, zlib.error) as error:
            reason = f"truncated or damaged {self.compression} file" if self.compression else "cannot be read"
            raise UsageError(f"{self.name}: {reason}: {error}") from None


def open_file(path: Path) -> SourceFile:
    """Raises UsageError for a file that is not read, saying what it seems to be."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    compression = "gzip" if start[:2] == b"\x1f\x8b" else "zstd" if start[:4] == b"\x28\xb5\x2f\xfd" else None
    if start.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path}: a pointer of Git LFS, not the data: run `git lfs pull` where it was cloned")
    if start.lstrip()[:9].lower() in (b"<!doctype", b"<html>", b"<html lan"):
        raise UsageError(f"{path}: a web page, not data: the download needs a login, or another address")
    return _with_its_lists(SourceFile(path, _kind(path, start), compression))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kind(path: Path, start: bytes) -> str:
    """By the first bytes of a table, whatever its name; by the name; by the first character of JSON."""
    if found := next((kind for first, kind in _FIRST_BYTES if start.startswith(first)), None):
        return found
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last in SUFFIXES:
        return SUFFIXES[last]
    if last in _PLAIN_TEXT and start.lstrip()[:1] == b"{":
        return "jsonl"
    if last in _IS_INSTEAD:
        raise UsageError(f"{path}: {_IS_INSTEAD[last]}")
    if start.lstrip()[:1] in (b"{", b"["):
        return "json"
    raise UsageError(f"{path}: unknown kind of file; allowed: {', '.join(SUFFIXES)}, also with .gz or .zst")


def _with_its_lists(file: SourceFile) -> SourceFile:
    """A file of JSON as what it is: lines, one list, or one object with lists of rows. Raises UsageError for others."""
    if file.kind not in ("json", "jsonl"):
        return file
    try:
        first, is_alone = _first_line(file)
        if first[:1] == b"[" and not (file.kind == "jsonl" and _is_json(first)):
            return replace(file, kind="json")
        if first[:1] != b"{" or (_is_json(first) and not is_alone):
            return replace(file, kind="jsonl")
        return _as_object(file, first)
    except (OSError, EOFError, zlib.error):
        return file  # it is named when it is read, beside others


def _first_line(file: SourceFile) -> tuple[bytes, bool]:
    """The first line that is not blank, and whether no other one follows."""
    with _open_plain(file) as stream:
        lines = (line.removeprefix(BOM).strip() for line in iter(lambda: stream.readline(MAX_ROW_BYTES), b""))
        lines = filter(None, lines)
        return next(lines, b""), next(lines, None) is None


def _as_object(file: SourceFile, first_line_of_it: bytes) -> SourceFile:
    """One object: a row on a line of its own, or lists of rows under keys."""
    is_one_line = _is_json(first_line_of_it)
    advice = f"write one row per line: jq -c . {file.path.name}"
    try:
        with _open_plain(file) as stream:
            members = members_of_object(stream, file.name)
    except SeveralValues:
        raise UsageError(f"{file.name}: rows over several lines each; {advice}") from None
    except UsageError:
        if file.kind == "jsonl" or first_line_of_it != b"{":
            return replace(file, kind="jsonl")  # lines, of which the first is broken
        raise
    firsts = [member.first for member in members.values() if member.kind is list and isinstance(member.first, dict)]
    is_row = any(not first.keys().isdisjoint(_TURN_KEYS) for first in firsts)
    if not is_row and (found := _what_else(members, file.path.name, is_one_line)):
        raise UsageError(f"{file.name}: {found}")
    rows = tuple(key for key, member in members.items() if member.kind is list and isinstance(member.first, dict))
    if is_one_line and (is_row or not rows):
        return replace(file, kind="jsonl")
    if is_row or not rows:
        raise UsageError(f"{file.name}: one row over several lines; {advice}")
    return replace(file, kind="json", lists=rows, key=rows[0] if len(rows) == 1 else None)


def _what_else(members: dict[str, Member], name: str, is_one_line: bool) -> str | None:
    """Of an object all of whose values are lists or objects: what it is, if not rows under a key; how to make rows.

    On one line, lists of numbers may be a row's tokens.
    """
    records = "write one object per row (pandas: to_json(orient='records', lines=True))"
    lists = {key: member.first for key, member in members.items() if member.kind is list}
    kinds = {type(first) for first in lists.values()}
    if lists and len(lists) == len(members) and dict not in kinds and (str in kinds or not is_one_line):
        return f"one object with the lists {_named(lists)}, the columns of a table; {records}"
    objects = [member.first or () for member in members.values() if member.kind is dict]
    if not objects or len(objects) < len(members):
        return None
    if all(key.isdecimal() for keys in objects for key in keys):
        return f"one object with the objects {_named(members)}, the columns of a table; {records}"
    inner = next(iter(members))
    if len(objects) > 1:
        return f"rows under a name each, such as {inner!r}; write one row per line: jq -c '.[]' {name} > rows.jsonl"
    return f"an object inside {inner!r}; take what is inside: jq '.{inner}' {name} > {inner}.json"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line, parse_int=len)  # however many digits it has
    except (ValueError, RecursionError):
        return False
    return True


def _named(keys: Iterable[str]) -> str:
    return ", ".join(map(repr, keys))


def _open_plain(file: SourceFile):
    """The file's bytes, decompressed."""
    if file.compression == "gzip":
        return gzip.open(file.path, "rb")
    if file.compression == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file.path), compression="zstd"), buffer_size=1 << 20)
    return file.path.open("rb")


def _refuse_utf16(file: SourceFile) -> None:
    if file.kind in ("parquet", "arrow"):
        return
    with _open_plain(file) as stream:
        start = stream.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise UsageError(f"{file.name}: not UTF-8 but UTF-16 (byte offset 0); convert it: iconv -f utf-16 -t utf-8")


def _read_jsonl(file: SourceFile):
    if file.compression is None:
        yield from chunks_of_lines(file.path)
        return
    with _open_plain(file) as stream:
        yield from chunks_of_lines(stream)


def _read_json(file: SourceFile):
    if file.lists and file.key is None:
        raise UsageError(
            f"{file.name}: one object with the lists {_named(file.lists)}; name the one with the rows: "
            f"--set data.train_split={file.lists[0]}"
        )
    with _open_plain(file) as stream:
        yield from chunks_of_json(stream, file.name, file.key)


def _read_csv(file: SourceFile):
    with _open_plain(file) as stream:
        yield from chunks_of_csv(stream, file.name, "\t" if file.kind == "tsv" else ",")


def _read_parquet(file: SourceFile):
    import pyarrow
    import pyarrow.parquet

    if file.compression:
        raise UsageError(f"{file.name}: Parquet is compressed inside; unpack the outer {file.compression} first")
    first_row = 1
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=ROWS_PER_TABLE):
                yield Table(first_row, batch)
                first_row += batch.num_rows
    except pyarrow.ArrowException as error:
        raise UsageError(f"{file.name}: not a readable Parquet file: {first_line(error)}") from None


def _read_arrow(file: SourceFile):
    """Of either of Arrow's two formats: files, as Feather is, and streams, as `datasets` writes."""
    import pyarrow

    if file.compression:
        raise UsageError(f"{file.name}: unpack the outer {file.compression} first: Arrow files are read where they lie")
    first_row = 1
    try:
        with pyarrow.memory_map(str(file.path)) as source:
            for batch in _record_batches(source):
                for start in range(0, batch.num_rows, ROWS_PER_TABLE):
                    table = batch.slice(start, ROWS_PER_TABLE)
                    yield Table(first_row, table)
                    first_row += table.num_rows
    except pyarrow.ArrowException as error:
        raise UsageError(f"{file.name}: not a readable Arrow file: {first_line(error)}") from None


def _record_batches(source):
    import pyarrow

    if source.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(source)
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    source.seek(0)
    return iter(pyarrow.ipc.open_stream(source))


_READERS = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
