"""Two answers with the words marked in which they differ."""

import re
from difflib import SequenceMatcher

from markupsafe import Markup, escape

EXACT_PAIRS = 100_000
"Pairs of words beyond which frequent words are not looked for: an answer that repeats itself would take minutes."


def marked(before: str, after: str) -> tuple[Markup, Markup]:
    """Both texts, escaped: words that only the first has in <del>, words that only the second has in <ins>."""
    old, new = (re.findall(r"\s*\S+|\s+$", text) for text in (before, after))
    left, right = [], []
    repetitive = len(old) * len(new) > EXACT_PAIRS
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=repetitive).get_opcodes():
        gone, come = "".join(old[a:b]), "".join(new[c:d])
        left.append(escape(gone) if kind == "equal" else _tagged("del", gone))
        right.append(escape(come) if kind == "equal" else _tagged("ins", come))
    return Markup("").join(left), Markup("").join(right)


def _tagged(tag: str, text: str) -> Markup:
    """Spaces before the words stay outside the mark."""
    words = text.lstrip()
    space = text[: len(text) - len(words)]
    return escape(space) + (Markup(f"<{tag}>{{}}</{tag}>").format(words) if words else "")
