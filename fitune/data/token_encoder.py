"""Token ids of rendered texts: what `tokenizers` returns, several times faster for one like Llama 3's.

Byte-level BPE never looks across the pieces its regular expression cuts a text into, and the same pieces come again and
again. So a piece is tokenised once and its ids remembered.
"""

import json
import re
from dataclasses import dataclass

import numpy as np

from fitune.data.chat_renderer import Span

ID_BYTES = 4

REMEMBERED_PIECES = 200_000
"About 25 MiB per process; then the memory starts afresh."

_CATEGORY_IN_DOUBT = re.compile(
    "[^\u0000-\u024f\u0370-\u0373\u0391-\u03a1\u03a3-\u03ff\u0400-\u0481\u2010-\u2027\u2030-\u205e\u20ac"
    "\u2190-\u21ff\u2200-\u22ff\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fbb\uac00-\ud7a3]"
)
"Outside of these blocks, letters were added to Unicode over the years: two regex engines may differ about a character."


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of one text."""

    ids: bytes
    "int32, one after the other"
    trained: list[Span]
    "`(start, stop)` in tokens of what is trained"

    @property
    def tokens(self) -> int:
        return len(self.ids) // ID_BYTES

    @property
    def trained_tokens(self) -> int:
        return sum(stop - start for start, stop in self.trained)


class TokenEncoder:
    """Rendered texts as token ids, and which of them lie in the spans that are trained."""

    def __init__(self, tokenizer):
        """`tokenizer`: a tokenizers.Tokenizer without truncation and padding."""
        self.tokenizer = tokenizer
        self._pieces = _piece_pattern(tokenizer)
        if self._pieces:
            from tokenizers.pre_tokenizers import ByteLevel

            self._to_bytes = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
            added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
            names = sorted(added, key=len, reverse=True)
            self._added = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None
            self._ids_of_added = {name: _packed([number]) for name, number in added.items()}
            self._ids_of: dict[str, bytes] = {}

    @property
    def remembers(self) -> bool:
        """Whether pieces are remembered; if not, `tokenizers` takes every text whole."""
        return self._pieces is not None

    def encode(self, texts: list[str], spans: list[list[Span]]) -> list[Encoded]:
        """The tokens of each text; `spans` holds, per text, `(start, end)` in characters, in order.

        A token is trained when any of its characters is in a span, as in transformers' assistant mask.
        """
        encoded = [self._encode_pieces(text, marked) for text, marked in zip(texts, spans, strict=True)]
        left = [number for number, found in enumerate(encoded) if found is None]
        whole = self.encode_whole([texts[n] for n in left], [spans[n] for n in left])
        for number, found in zip(left, whole, strict=True):
            encoded[number] = found
        return encoded

    def encode_whole(self, texts: list[str], spans: list[list[Span]]) -> list[Encoded]:
        """The same through `tokenizers`, for any tokenizer and any text."""
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [
            Encoded(_packed(encoding.ids), trained_tokens(encoding.offsets, marked))
            for encoding, marked in zip(encodings, spans, strict=True)
        ]

    def _encode_pieces(self, text: str, spans: list[Span]) -> Encoded | None:
        """None where only `tokenizers` can tell."""
        if not self._pieces or not (text.isascii() or not _CATEGORY_IN_DOUBT.search(text)):
            return None
        edges = [edge for span in spans for edge in span]
        at_edge, next_edge, position, tokens, blocks = [], 0, 0, 0, []
        parts = self._added.split(text) if self._added else [text]
        for number, part in enumerate(parts):
            part_end = position + len(part)
            if number % 2:
                pieces, block = (part,), self._ids_of_added[part]
            else:
                pieces = self._pieces.findall(part)
                block = self._ids(pieces)
            while next_edge < len(edges) and edges[next_edge] < part_end:
                before = _pieces_until(pieces, edges[next_edge] - position)
                if before is None:
                    return None
                at_edge.append(tokens + (len(self._ids(pieces[:before])) // ID_BYTES if before else 0))
                next_edge += 1
            tokens += len(block) // ID_BYTES
            blocks.append(block)
            position = part_end
        at_edge += [tokens] * (len(edges) - next_edge)
        return Encoded(b"".join(blocks), list(zip(at_edge[::2], at_edge[1::2], strict=True)))

    def _ids(self, pieces: list[str]) -> bytes:
        """The ids of all pieces, one after the other."""
        known = self._ids_of
        try:
            return b"".join(map(known.__getitem__, pieces))
        except KeyError:
            if len(known) > REMEMBERED_PIECES:
                known.clear()
            for piece in set(pieces) - known.keys():
                tokens = self.tokenizer.model.tokenize(self._to_bytes(piece)[0][0])
                known[piece] = _packed([token.id for token in tokens])
            return b"".join(map(known.__getitem__, pieces))


def trained_tokens(offsets: list[Span], spans: list[Span]) -> list[Span]:
    """[start, stop) of the tokens of each span: those that hold any of its characters, and what is between them.

    `offsets` gives each token's characters. Some tokenizers leave white space at a token's edge out of them.
    """
    found, number = [], 0
    for start, end in spans:
        while number < len(offsets) and offsets[number][1] <= start:
            number += 1
        first = number
        while number < len(offsets) and offsets[number][0] < end:
            number += 1
        found.append((first, number))
    return found


def _packed(ids: list[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def _pieces_until(pieces, offset: int) -> int | None:
    """How many pieces end at or before `offset` characters; None if it falls inside one."""
    count = 0
    while offset > 0:
        offset -= len(pieces[count])
        count += 1
    return count if offset == 0 else None


def _piece_pattern(tokenizer):
    """The compiled pattern of a tokenizer that is exactly `split by a regex, bytes, BPE`; else None."""
    try:
        import regex
    except ImportError:
        return None
    model, splitter = tokenizer.model, tokenizer.pre_tokenizer
    if type(model).__name__ != "BPE" or model.dropout or tokenizer.normalizer is not None or splitter is None:
        return None
    if any(
        token.lstrip or token.rstrip or token.single_word for token in tokenizer.get_added_tokens_decoder().values()
    ):
        return None
    steps = json.loads(splitter.__getstate__()).get("pretokenizers", ())
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, bytes_step = steps
    if split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        return None
    if bytes_step["add_prefix_space"] or bytes_step["use_regex"]:
        return None
    try:
        pattern = regex.compile(split["pattern"]["Regex"])
    except regex.error:
        return None
    return pattern if pattern.groups == 0 else None
