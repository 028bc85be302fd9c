"""Where rows come from: local files of every usual kind, folders of them, Hub datasets; read in bounded chunks."""

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fitune.data.file_formats import (
    ROWS_PER_TABLE,
    Chunk,
    Table,
    chunks_of_csv,
    chunks_of_json_list,
    chunks_of_lines,
    first_line,
)
from fitune.data.hub_dataset import Splits, open_hub_dataset
from fitune.errors import UsageError, nearest

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv"}
COMPRESSED = (".gz", ".zst", ".zstd")


@dataclass(frozen=True)
class SourceFile:
    """One local file of rows."""

    path: Path
    kind: str
    "jsonl, json, parquet, csv or tsv"
    compression: str | None
    "gzip, zstd or None; found by the file's first bytes"

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


def open_source(dataset: str, revision: str | None, train_split: str, test_split: str | None) -> Splits:
    """The splits of a local file, a folder or a Hub id. Raises UsageError for what is neither."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _split_files(path, train_split, test_split)
    if path.exists():
        return Splits(train=[open_file(path)], test=[])
    if _looks_like_a_path(dataset):
        raise UsageError(f"{dataset}: no such file{_nearby_file(path)}")
    if len(path.parts) != 2:
        raise UsageError(f"{dataset}: no such file{_nearby_file(path)}; a dataset on the Hub is ORGANISATION/NAME")
    return open_hub_dataset(dataset, revision, train_split, test_split)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_file(path: Path) -> SourceFile:
    """Raises UsageError for a kind of file that is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = SUFFIXES.get(suffixes[-1]) if suffixes else None
    if kind is None:
        raise UsageError(f"{path}: unknown kind of file; allowed: {', '.join(SUFFIXES)}, also with .gz or .zst")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    compression = "gzip" if start[:2] == b"\x1f\x8b" else "zstd" if start == b"\x28\xb5\x2f\xfd" else None
    return SourceFile(path, kind, compression)


def _split_files(folder: Path, train_split: str, test_split: str | None) -> Splits:
    """Files whose name or parent folder begins with the split's name belong to it; without such names all are train."""
    names = (*SUFFIXES, *(suffix + packed for suffix in SUFFIXES for packed in COMPRESSED))
    everything = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    paths = [path for path in everything if path.name.lower().endswith(names)]
    if not paths:
        raise UsageError(f"{folder}: no data files in this folder; allowed: {', '.join(SUFFIXES)}")
    test = [path for path in paths if test_split and _belongs(path.relative_to(folder), test_split)]
    train = [path for path in paths if _belongs(path.relative_to(folder), train_split)]
    in_test = set(test)
    if both := [path for path in train if path in in_test]:
        raise UsageError(f"{both[0]}: its name says both '{train_split}' and '{test_split}'; rename the file or folder")
    if not train:
        train = [path for path in paths if path not in in_test]
    if not train:
        raise UsageError(f"{folder}: every file belongs to the split '{test_split}', none to '{train_split}'")
    read = in_test.union(train)
    ignored = [str(path) for path in everything if path not in read]
    return Splits([open_file(path) for path in train], [open_file(path) for path in test], ignored=ignored)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _belongs(path: Path, split: str) -> bool:
    return any(re.match(rf"{re.escape(split)}(?:[-_.]|$)", part) for part in path.parts)


def _looks_like_a_path(dataset: str) -> bool:
    return dataset.startswith((".", "/", "~")) or dataset.count("/") > 1 or dataset.endswith((*SUFFIXES, *COMPRESSED))


def _nearby_file(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    suggestion = nearest(path.name, names)
    return suggestion if "did you mean" in suggestion else ""


def _open_plain(file: SourceFile):
    """The file's bytes, decompressed."""
    if file.compression == "gzip":
        return gzip.open(file.path, "rb")
    if file.compression == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file.path), compression="zstd"), buffer_size=1 << 20)
    return file.path.open("rb")


def _refuse_utf16(file: SourceFile) -> None:
    if file.kind == "parquet":
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
    """A .json file holds one list of objects, or, as some exports do, one object per line."""
    with _open_plain(file) as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] != b"[":
        yield from _read_jsonl(file)
        return
    with _open_plain(file) as stream:
        yield from chunks_of_json_list(stream, file.name)


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


_READERS = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "tsv": _read_csv, "parquet": _read_parquet}
