"""Counts tokens without making them: what `tokenizers` would return, several times faster for one like Llama 3's.

Byte-level BPE never looks across the pieces its regular expression cuts a text into, and the same pieces come again and
again. So a piece is tokenised once and its number of tokens remembered.
"""

import json
import re

from fitune.data.chat_renderer import Span

REMEMBERED_PIECES = 200_000
"About 25 MiB per process; then the memory starts afresh."

_CATEGORY_IN_DOUBT = re.compile(
    "[^\u0000-\u024f\u0370-\u0373\u0391-\u03a1\u03a3-\u03ff\u0400-\u0481\u2010-\u2027\u2030-\u205e\u20ac"
    "\u2190-\u21ff\u2200-\u22ff\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fbb\uac00-\ud7a3]"
)
"Outside of these blocks, letters were added to Unicode over the years: two regex engines may differ about a character."


class TokenCounter:
    """Tokens of rendered conversations, and how many of them lie in the spans that are trained."""

    def __init__(self, tokenizer):
        """`tokenizer`: a tokenizers.Tokenizer without truncation and padding."""
        self.tokenizer = tokenizer
        self._pieces = _piece_pattern(tokenizer)
        if self._pieces:
            from tokenizers.pre_tokenizers import ByteLevel

            self._to_bytes = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
            names = sorted((token.content for token in tokenizer.get_added_tokens_decoder().values()), key=len)
            self._added = re.compile(f"({'|'.join(map(re.escape, reversed(names)))})") if names else None
            self._tokens_in: dict[str, int] = {}

    @property
    def remembers(self) -> bool:
        """Whether pieces are remembered; if not, `tokenizers` counts every text whole."""
        return self._pieces is not None

    def count(self, texts: list[str], spans: list[list[Span]]) -> list[tuple[int, int]]:
        """`(tokens, trained tokens)` of each text; `spans` holds, per text, `(start, end)` in characters.

        Which tokens are trained is for `trained_tokens` to say.
        """
        counts = [self._count_pieces(text, marked) for text, marked in zip(texts, spans, strict=True)]
        left = [number for number, count in enumerate(counts) if count is None]
        for number, count in zip(
            left, self.count_whole([texts[n] for n in left], [spans[n] for n in left]), strict=True
        ):
            counts[number] = count
        return counts

    def count_whole(self, texts: list[str], spans: list[list[Span]]) -> list[tuple[int, int]]:
        """The same through `tokenizers`, for any tokenizer and any text."""
        counts = []
        for encoding, marked in zip(self.tokenizer.encode_batch(texts, add_special_tokens=False), spans, strict=True):
            counts.append(
                (len(encoding), sum(stop - start for start, stop in trained_tokens(encoding.offsets, marked)))
            )
        return counts

    def _count_pieces(self, text: str, spans: list[Span]) -> tuple[int, int] | None:
        """None where only `tokenizers` can tell."""
        if not self._pieces or not (text.isascii() or not _CATEGORY_IN_DOUBT.search(text)):
            return None
        edges = [edge for span in spans for edge in span]
        at_edge, next_edge, position, tokens = [], 0, 0, 0
        parts = self._added.split(text) if self._added else [text]
        for number, part in enumerate(parts):
            part_end = position + len(part)
            if number % 2:
                pieces, sizes = (part,), (1,)
            else:
                pieces = self._pieces.findall(part)
                sizes = self._sizes(pieces)
            before = 0
            while next_edge < len(edges) and edges[next_edge] < part_end:
                before = _pieces_until(pieces, edges[next_edge] - position)
                if before is None:
                    return None
                at_edge.append(tokens + sum(sizes[:before]))
                next_edge += 1
            tokens += sum(sizes)
            position = part_end
        at_edge += [tokens] * (len(edges) - next_edge)
        return tokens, sum(at_edge[1::2]) - sum(at_edge[::2])

    def _sizes(self, pieces: list[str]) -> list[int]:
        """Tokens in each piece."""
        known = self._tokens_in
        try:
            return [known[piece] for piece in pieces]
        except KeyError:
            if len(known) > REMEMBERED_PIECES:
                known.clear()
            for piece in set(pieces) - known.keys():
                known[piece] = len(self.tokenizer.model.tokenize(self._to_bytes(piece)[0][0]))
            return [known[piece] for piece in pieces]


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
