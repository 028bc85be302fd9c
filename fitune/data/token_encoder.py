"""Token ids of rendered texts: what `tokenizers` returns, several times faster for one like Llama 3's.

Byte-level BPE never looks across the pieces its regular expression cuts a text into, and the same pieces come again and
again. So a piece is tokenised once and its ids remembered.
"""

import itertools
import json
import re
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from fitune.data.chat_renderer import Span
from fitune.data.piece_pattern import BEYOND, piece_pattern

ID_BYTES = 4

REMEMBERED_PIECES = 200_000
"About 25 MiB per process; then the memory starts afresh."


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
        self._pieces = _pieces_of(tokenizer)
        if self._pieces:
            from tokenizers.pre_tokenizers import ByteLevel

            self._to_bytes = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
            added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
            names = sorted(added, key=len, reverse=True)
            self._added = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None
            self._ids_of_added = {name: _packed([number]) for name, number in added.items()}
            self._ids_of = dict(self._ids_of_added)

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
        if not self._pieces or not (text.isascii() or not BEYOND.search(text)):
            return None
        pieces = []
        for number, part in enumerate(self._added.split(text) if self._added else [text]):
            if number % 2:
                pieces.append(part)
            elif part:
                pieces += self._pieces.findall(part)
        ends = [0, *itertools.accumulate(map(len, pieces))]
        edges = [*itertools.chain(*spans), len(text)]
        cuts = [bisect_left(ends, edge) for edge in edges]
        if any(cut == len(ends) or ends[cut] != edge for cut, edge in zip(cuts, edges, strict=True)):
            return None  # a span begins inside a piece, or the pattern does not find all of the text
        blocks = [self._ids(pieces[start:stop]) for start, stop in itertools.pairwise([0, *cuts])]
        at_edge = list(itertools.accumulate(len(block) // ID_BYTES for block in blocks))
        return Encoded(b"".join(blocks), list(zip(at_edge[0:-1:2], at_edge[1::2], strict=True)))

    def _ids(self, pieces: list[str]) -> bytes:
        """The ids of all pieces, one after the other."""
        try:
            return b"".join(map(self._ids_of.__getitem__, pieces))
        except KeyError:
            if len(self._ids_of) > REMEMBERED_PIECES:
                self._ids_of = dict(self._ids_of_added)
            # a difference of sets would walk over all that are known
            for piece in itertools.filterfalse(self._ids_of.__contains__, set(pieces)):
                tokens = self.tokenizer.model.tokenize(self._to_bytes(piece)[0][0])
                self._ids_of[piece] = _packed([token.id for token in tokens])
            return b"".join(map(self._ids_of.__getitem__, pieces))


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


def _pieces_of(tokenizer) -> re.Pattern | None:
    """What finds the pieces of a tokenizer that is exactly `split by a regex, bytes, BPE`; else None."""
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
    return piece_pattern(split["pattern"]["Regex"])
