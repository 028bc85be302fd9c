"""Python's `re` cuts texts where the tokenizer's own engine does, at every character."""

import pytest
from tiny_tokenizer import SPLIT, tiny_tokenizer
from tokenizers import Regex, pre_tokenizers

from fitune.data.piece_pattern import BEYOND, piece_pattern
from fitune.data.token_encoder import TokenEncoder

OF_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHARACTERS = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x10000), *range(0x1F300, 0x1FB00))]


@pytest.mark.parametrize("pattern", [SPLIT, OF_O200K, SPLIT.replace("{1,3}", "")], ids=["llama3", "o200k", "qwen2"])
def test_each_character_is_cut_as_by_the_tokenizers_engine(pattern):
    in_contexts = zip(*[(c, f"a{c}'{c}", f"A{c}1 {c}\n", f"'{c}{c} ") for c in CHARACTERS], strict=True)
    engine = pre_tokenizers.Split(Regex(pattern), "isolated")
    for text in map("".join, in_contexts):
        assert not BEYOND.search(text)
        assert piece_pattern(pattern).findall(text) == [piece for piece, _ in engine.pre_tokenize_str(text)]


@pytest.mark.parametrize("pattern", [r"\w+|\W+", r"(a)|\s+", r"\p{Han}+", "[a-z]+", r"(?i:'k)|\s+", r"[\p{L}&&[^a]]+"])
def test_what_re_may_read_otherwise_is_not_translated(pattern):
    assert piece_pattern(pattern) is None


def test_a_letter_beyond_those_written_out_is_left_to_tokenizers():
    encoder = TokenEncoder(tiny_tokenizer().backend_tokenizer)
    for text, is_known in (("wait 🙂 for it", True), ("好。 سلام ไทย", True), ("\U00010400x", False)):
        assert (encoder._encode_pieces(text, []) is not None) == is_known
        assert encoder.encode([text], [[]]) == encoder.encode_whole([text], [[]])


def test_text_between_the_pieces_is_not_lost():
    backend = tiny_tokenizer().backend_tokenizer
    only_digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([only_digits, to_bytes])
    encoder = TokenEncoder(backend)
    assert encoder.remembers
    assert encoder.encode(["in 1999 or 2000"], [[(3, 7)]]) == encoder.encode_whole(["in 1999 or 2000"], [[(3, 7)]])
