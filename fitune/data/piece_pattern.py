r"""The regular expression that a tokenizer cuts texts with, as one of Python's `re`, which runs it twice as fast.

`re` knows no Unicode properties such as \p{L}: their characters are written out. Which these are is asked of the
tokenizer's own engine, as letters are added to Unicode every year.
"""

import re
from functools import cache

_PROPERTY = re.compile(r"\\p\{[LMN][a-z]?\}|\\s")
_SAME_IN_BOTH = re.compile(
    rf"(?P<set>\[\^?(?:{_PROPERTY.pattern}|\\[rn]|/)+\])"
    rf"|(?P<property>{_PROPERTY.pattern})"
    r"|\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)"
    r"|\\[rn]|\(\?[!:]|[)?+*|' ]|\{\d+(?:,\d*)?\}"
)
"What `re` and the tokenizers' engine take for the same, once properties are written out."

BEYOND = re.compile("[^\u0000-\uffff\U0001f300-\U0001faff]")
"Finds a character that the written out properties leave out, whatever it is. Symbols and emoji belong to none."


def piece_pattern(pattern: str) -> re.Pattern | None:
    """`pattern` of a tokenizer for `re`; None where it may mean something else there.

    It finds the same pieces in any text in which BEYOND finds nothing.
    """
    pattern = pattern.replace(r"\S", r"[^\s]")
    position, parts = 0, []
    while position < len(pattern):
        part = _SAME_IN_BOTH.match(pattern, position)
        if part is None:
            return None
        written_out = _PROPERTY.sub(lambda name: _characters_of(name.group()), part.group())
        parts.append(f"[{written_out}]" if part["property"] else written_out)
        position = part.end()
    return re.compile("".join(parts))


@cache
def _characters_of(name: str) -> str:
    r"""The characters below U+10000 of a property, such as `\s`, as the ranges of a set."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    runs = Split(Regex(f"[^{name}]+"), "removed").pre_tokenize_str(_basic_plane())
    return "".join(f"{re.escape(run[0])}-{re.escape(run[-1])}" for run, _ in runs)


@cache
def _basic_plane() -> str:
    """All characters below U+10000, without the halves of surrogates."""
    return "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10000))))
