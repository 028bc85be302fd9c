"""What one process does with one chunk: each row converted, checked, rendered, counted."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np

from fitune.data import conversations, row_formats
from fitune.data.chat_renderer import AnswerNotFound, ChatRenderer
from fitune.data.conversations import REASONING, RowError
from fitune.data.file_formats import MAX_ROW_BYTES, too_large
from fitune.data.preferences import refuse_preferences
from fitune.data.reasoning import unwritten_reasoning
from fitune.data.rendering import render_row
from fitune.data.row_filter import is_kept
from fitune.data.rules import Rules
from fitune.data.token_encoder import Encoded
from fitune.data.training_flags import (
    check_something_is_trained,
    refuse_flags_of_the_row,
    refuse_template_arguments,
    trained_answers,
)

EXAMPLES_PER_REASON = 20
ROWS_PER_BATCH = 256
HASH_BYTES = 16
NOT_ENCODED = Encoded(b"", [])


@dataclass(frozen=True)
class Shape:
    """What the rows of one source look like."""

    format: str
    system_message: str | None
    columns: dict[str, str]
    keep: dict[str, Any]
    ignored_keys: tuple[str, ...]
    format_is_named: bool
    "By the recipe or --format, not found out."

    def refuse_preferences(self, record: dict) -> None:
        """Raises RowError for a record that holds good and bad answers, of which nothing says which to take."""
        refuse_preferences(record, answer_is_named=self.format_is_named or bool(self.columns), kept_by=tuple(self.keep))

    def without_ignored(self, record: dict) -> dict:
        if not self.ignored_keys:
            return record
        return {key: value for key, value in record.items() if key not in self.ignored_keys}


@dataclass
class Outcome:
    """A chunk's good rows as JSON lines, with one entry per row in each array, and what was wrong with the others."""

    rows_in: int = 0
    lines: int = 0
    text: bytes = b""
    sizes: np.ndarray = None
    "bytes of each line, uint32"
    hashes: bytes = b""
    "HASH_BYTES for each row"
    ids: bytes = b""
    "int32, the tokens of all rows"
    tokens: np.ndarray = None
    "of each row, uint32"
    trained: np.ndarray = None
    "tokens of each row that are trained, uint32"
    edges: np.ndarray = None
    "int32, start and stop of each trained run of tokens, counted from its row's first"
    runs: np.ndarray = None
    "trained runs of each row, uint32"
    is_text: np.ndarray = None
    "whether each row is a plain text, bool"
    counts: dict[str, int] = field(default_factory=dict)
    "rows refused, by reason"
    examples: list[tuple[str, int, str]] = field(default_factory=list)
    "(reason, number in the chunk or file, message), the first EXAMPLES_PER_REASON of each reason"
    cut: int = 0
    escaped: int = 0
    reasoning_dropped: int = 0

    def leave_out(self, reason: str) -> None:
        """A row that is good, but not wanted."""
        self.counts[reason] = self.counts.get(reason, 0) + 1

    def refuse(self, number: int, error: RowError) -> None:
        seen = self.counts.get(error.reason, 0)
        self.counts[error.reason] = seen + 1
        if seen < EXAMPLES_PER_REASON:
            self.examples.append((error.reason, number, str(error)))


@dataclass
class Row:
    """A row on its way through the checks."""

    number: int
    conversation: dict
    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    encoded: Encoded = NOT_ENCODED

    @property
    def is_text(self) -> bool:
        """Without turns: all of it is trained, and it may be split anywhere."""
        return "text" in self.conversation


class Checker:
    """Applies the rules to chunks."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self._renderer = ChatRenderer(rules.template, rules.special_tokens) if rules.template else None

    def check(self, chunk, shape: Shape) -> Outcome:
        """Every row of `chunk`, in order."""
        outcome, good = Outcome(), []  # (line, tokens, whether it is a text)
        for batch in _batches(self._converted(chunk, shape, outcome), ROWS_PER_BATCH):
            if self.rules.encoder is not None:
                batch = self._encoded(batch, outcome)
            good += self._written(batch, outcome)
        _fill(outcome, *map(list, zip(*good, strict=True) if good else ([], [], [])))
        return outcome

    def _written(self, batch: list[Row], outcome: Outcome) -> Iterator[tuple[bytes, Encoded, bool]]:
        """Each row's line with its tokens. Formats other than lines have no limit of their own on a row's size."""
        for row in batch:
            line = _json_line(row.conversation)
            if len(line) > MAX_ROW_BYTES:
                outcome.refuse(row.number, too_large(len(line)))
            else:
                yield line, row.encoded, row.is_text

    def _converted(self, chunk, shape: Shape, outcome: Outcome) -> Iterator[Row]:
        """Rows that pass every check on their words; the others are noted in `outcome`."""
        for number, record in chunk.records():
            outcome.lines = number
            if isinstance(record, str) and not record.strip():
                continue
            outcome.rows_in += 1
            try:
                conversation = self._conversation(shape.without_ignored(parse_record(record)), shape)
                if conversation is None:
                    outcome.leave_out("not_kept")
                    continue
                if "messages" in conversation:
                    conversations.check_turns(conversation["messages"])
                    check_something_is_trained(conversation["messages"], self.rules.train_on)
                conversations.check_not_rendered(conversation)
                if self.rules.escape_control_tokens:
                    outcome.escaped += conversations.escape_control_tokens(conversation, self.rules.control_tokens)
                conversations.check_text(conversation, self.rules.control_tokens)
                row = self._rendered(Row(number, conversation))
                outcome.reasoning_dropped += self._without_unwritten_reasoning(row)
                yield row
            except RowError as error:
                outcome.refuse(number, error)

    def _conversation(self, record: dict, shape: Shape) -> dict | None:
        """None for a row that `keep` leaves out."""
        shape.refuse_preferences(record)
        if not is_kept(record, shape.keep):
            return None
        row = row_formats.rename_columns(record, shape.columns)
        format = shape.format
        if self.rules.own_lines:
            format = row_formats.detect_format(row) or format
        elif not shape.format_is_named:
            format = row_formats.format_of_row(row, format)
        if not row.keys() <= row_formats.READ_COLUMNS[format]:
            refuse_flags_of_the_row(row, row_formats.READ_COLUMNS[format].union(shape.keep))
            refuse_template_arguments(row)
        return row_formats.to_conversation(row, format, shape.system_message, shape.ignored_keys)

    def _rendered(self, row: Row) -> Row:
        if self._renderer:
            try:
                row.text, row.spans = render_row(self._renderer, row.conversation, self.rules.train_on)
            except AnswerNotFound as error:
                raise RowError("answer_not_found", f"the chat template hides what is to be trained: {error}") from None
            except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
                raise RowError("template_refused", f"the chat template refuses it: {error}") from None
        return row

    def _without_unwritten_reasoning(self, row: Row) -> int:
        """Takes thinking that the template does not write out of the row; how often. Raises RowError unless allowed."""
        messages = row.conversation.get("messages", ())
        if not self._renderer or not any(REASONING[0] in message for message in messages):
            return 0
        trained = trained_answers(messages, self.rules.train_on)
        unwritten = unwritten_reasoning(messages, trained, row.text, row.spans, self.rules.template)
        if unwritten and self.rules.reasoning != "drop":
            raise RowError(
                "reasoning_not_written",
                f"{messages[unwritten[0]].where}: the chat template does not write its thinking; take a template that "
                f"does, or leave thinking out: --set data.reasoning=drop",
            )
        for number in unwritten:
            del messages[number][REASONING[0]]
        return len(unwritten)

    def _encoded(self, rows: list[Row], outcome: Outcome) -> list[Row]:
        self._encode(rows)
        kept = []
        for row in rows:
            if self.rules.max_length and row.encoded.tokens > self.rules.max_length and not row.is_text:
                try:
                    row = self._shortened(row)
                    outcome.cut += 1
                except RowError as error:
                    outcome.refuse(row.number, error)
                    continue
            kept.append(row)
        return kept

    def _encode(self, rows: list[Row]) -> None:
        encoded = self.rules.encoder.encode([row.text for row in rows], [row.spans for row in rows])
        for row, tokens in zip(rows, encoded, strict=True):
            row.encoded = tokens

    def _shortened(self, row: Row) -> Row:
        """The row without its last turns, cut after the last answer that still fits. Raises RowError."""
        limit = self.rules.max_length
        if self.rules.long_rows != "cut":
            raise RowError("too_long", f"{row.encoded.tokens:,} tokens, max_length is {limit:,}")
        messages = row.conversation["messages"]
        ends = [number for number, message in enumerate(messages) if _ends_exchange(messages, number)]
        for end in reversed(ends[:-1]):
            shorter = Row(row.number, row.conversation | {"messages": messages[: end + 1]})
            if not any(trained_answers(shorter.conversation["messages"], self.rules.train_on)):
                continue
            self._encode([self._rendered(shorter)])
            if shorter.encoded.tokens <= limit:
                return shorter
        raise RowError(
            "too_long", f"{row.encoded.tokens:,} tokens; max_length of {limit:,} ends inside its first answer"
        )


def parse_record(record) -> dict:
    """A record as a dict; raises RowError for what is not one."""
    if isinstance(record, RowError):
        raise record
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except json.JSONDecodeError as error:
            raise RowError(
                "invalid_json", f"invalid JSON: {error.msg.removesuffix(' at')} (character {error.pos + 1})"
            ) from None
        except ValueError:
            most = sys.get_int_max_str_digits()
            raise RowError("invalid_json", f"invalid JSON: a whole number of more than {most:,} digits") from None
        except RecursionError as error:
            raise RowError("invalid_json", f"invalid JSON: {error}") from None
    if not isinstance(record, dict):
        raise RowError("wrong_type", f"expected an object {{...}}, found {type(record).__name__}")
    return record


def _fill(outcome: Outcome, lines: list[bytes], encoded: list[Encoded], is_text: list[bool]) -> None:
    """Puts the good rows into the outcome's arrays."""
    outcome.text = b"".join(lines)
    outcome.sizes = np.fromiter(map(len, lines), np.uint32, len(lines))
    outcome.hashes = b"".join(hashlib.blake2b(line, digest_size=HASH_BYTES).digest() for line in lines)
    outcome.ids = b"".join(row.ids for row in encoded)
    outcome.tokens = np.fromiter((row.tokens for row in encoded), np.uint32, len(encoded))
    outcome.trained = np.fromiter((row.trained_tokens for row in encoded), np.uint32, len(encoded))
    outcome.edges = np.array([edge for row in encoded for run in row.trained for edge in run], np.int32)
    outcome.is_text = np.array(is_text, bool)
    outcome.runs = np.fromiter((len(row.trained) for row in encoded), np.uint32, len(encoded))


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch


def _ends_exchange(messages: list[dict], number: int) -> bool:
    """Whether it is an answer that asks for no tool, by a call or in its text."""
    message, after = messages[number], messages[number + 1 : number + 2]
    asks = message.get("tool_calls") or any(turn["role"] == "tool" for turn in after)
    return message["role"] == "assistant" and not asks


def _json_line(conversation: dict) -> bytes:
    return _as_json(conversation).encode() + b"\n"


_as_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
