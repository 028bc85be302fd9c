"""Walks over JSON files with a buffer of one block and one element: a list of rows, or an object with lists of rows."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from fitune.data import file_formats
from fitune.data.conversations import RowError
from fitune.data.file_formats import Rows, too_large
from fitune.errors import UsageError

_MAX_ELEMENT_CHARACTERS = 64 << 20


def chunks_of_json(stream: BinaryIO, name: str, key: str | None = None) -> Iterator[Rows]:
    """The objects of one JSON list, or of the list under a key of an object, cut out one by one as JSON text.

    The list itself is never in memory. Raises UsageError at the first place where the file is not JSON: what follows
    cannot be read.
    """
    walker = _JsonWalker(stream, name)
    numbers, rows, size = [], [], 0
    for line, text in walker.elements() if key is None else walker.elements_under(key):
        numbers.append(line)
        rows.append(text)
        size += len(text) if isinstance(text, str) else 0
        if size >= file_formats.CHUNK_BYTES:
            yield Rows(numbers, rows)
            numbers, rows, size = [], [], 0
    if rows:
        yield Rows(numbers, rows)


@dataclass(frozen=True)
class Member:
    """What stands under a key of an object, without its bulk."""

    kind: type
    "list, dict, or object for all else"
    first: object = None
    "the first element of a list, or the keys of an object; None where it is empty"


class SeveralValues(UsageError):
    """A file that goes on after its first JSON value."""


def members_of_object(stream: BinaryIO, name: str) -> dict[str, Member]:
    """Each key of one JSON object, and what stands under it.

    Reads the file to its end. Raises UsageError where it is not one JSON object.
    """
    return dict(_JsonWalker(stream, name).members())


class _JsonWalker:
    def __init__(self, stream: BinaryIO, name: str):
        self._stream, self._name = stream, name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._buffer, self._position, self._line = "", 0, 1
        self._bytes_read, self._ended = 0, False

    def elements(self) -> Iterator[tuple[int, str | RowError]]:
        """`(line, JSON text)` of each element of `[{...}, {...}, ...]`."""
        yield from self._elements()
        self._expect_end("list")

    def elements_under(self, key: str) -> Iterator[tuple[int, str | RowError]]:
        """The same of the list under `key`."""
        for found in self._keys():
            if found == key:
                yield from self._elements()
            else:
                self._skip_value()

    def members(self) -> Iterator[tuple[str, Member]]:
        for key in self._keys():
            opening = self._next_character()
            if opening == "[":
                elements = self._elements()
                _, first = next(elements, (0, None))
                for _ in elements:
                    pass
                yield key, Member(list, json.loads(first) if isinstance(first, str) else None)
            elif opening == "{":
                yield key, Member(dict, list(json.loads(self._value_text())) or None)
            else:
                self._value_text()
                yield key, Member(object)

    def _keys(self) -> Iterator[str]:
        """Each key of the object; whoever asks for the next has read its value by then."""
        self._expect("{")
        if self._next_character() != "}":
            while True:
                if self._next_character() != '"':
                    self._expect('"')
                key = json.loads(self._value_text())
                self._expect(":")
                yield key
                if self._next_character() == "}":
                    break
                self._expect(",")
        self._advance(self._position + 1)
        self._expect_end("object")

    def _skip_value(self) -> None:
        if self._next_character() == "[":
            for _ in self._elements():
                pass
        else:
            self._value_text()

    def _elements(self) -> Iterator[tuple[int, str | RowError]]:
        self._expect("[")
        if self._next_character() != "]":
            while True:
                self._next_character()
                line, text = self._line, self._value_text()
                yield line, text if len(text) <= file_formats.MAX_ROW_BYTES else too_large(len(text))
                if self._next_character() == "]":
                    break
                self._expect(",")
        self._advance(self._position + 1)

    def _value_text(self) -> str:
        """The JSON value that begins here."""
        parse = json.JSONDecoder(parse_int=len).raw_decode  # only its end counts here; Python limits an int's digits
        while True:
            try:
                _, end = parse(self._buffer, self._position)
                if end < len(self._buffer) or self._ended:
                    break
                self._read_more()  # a number may go on in the next block
            except RecursionError:
                self._fail("nested too deeply")
            except json.JSONDecodeError as error:
                if len(self._buffer) - self._position > _MAX_ELEMENT_CHARACTERS:
                    self._fail(f"an element of more than {_MAX_ELEMENT_CHARACTERS >> 20} MiB, or never closed")
                into_element = error.pos - self._position
                if not self._read_more():
                    self._advance(self._position + into_element)
                    self._fail(error.msg.removesuffix(" at"))
        text = self._buffer[self._position : end]
        self._advance(end)
        return text

    def _expect(self, character: str) -> None:
        found = self._next_character()
        if found != character:
            self._fail(
                f"expected '{character}', found {found!r}" if found else f"expected '{character}', the file ends"
            )
        self._advance(self._position + 1)

    def _expect_end(self, of: str) -> None:
        if self._next_character():
            after = self._buffer[self._position : self._position + 20]
            self._fail(f"text after the end of the {of}: {after!r}", SeveralValues)

    def _next_character(self) -> str:
        """The next one that is not white space; empty at the end of the file."""
        while True:
            end = self._position
            while end < len(self._buffer) and self._buffer[end] in " \t\r\n":
                end += 1
            self._advance(end)
            if end < len(self._buffer):
                return self._buffer[end]
            if not self._read_more():
                return ""

    def _advance(self, position: int) -> None:
        self._line += self._buffer.count("\n", self._position, position)
        self._position = position

    def _read_more(self) -> bool:
        block = self._stream.read(1 << 20)
        if self._ended:
            return False
        self._ended = not block
        try:
            text = self._decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = self._bytes_read + len(block) - len(error.object) + error.start
            raise UsageError(f"{self._name}: not UTF-8: byte offset {offset} of the file") from None
        self._bytes_read += len(block)
        self._buffer, self._position = self._buffer[self._position :] + text, 0
        return bool(block)

    def _fail(self, reason: str, kind: type[UsageError] = UsageError):
        raise kind(f"{self._name}:{self._line}: invalid JSON: {reason}; nothing after it can be read")
