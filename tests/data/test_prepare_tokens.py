"""Token ids equal those of `tokenizers`, whatever the text; packing equals TRL's."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer
from tokenizers import normalizers, pre_tokenizers

from fitune.data.chat_renderer import ChatRenderer
from fitune.data.chat_template import apply_chat_template_choice
from fitune.data.packing import Layout, lay_out, write_layout
from fitune.data.row_store import RowStore, _first_occurrences
from fitune.data.token_encoder import TokenEncoder
from fitune.data.token_file import TokenBatch, TokenFile, write_tokens
from fitune.data.token_report import token_statistics

CHARACTERS = list(" \n\t\r'sS.?  ab1234567") * 20 + [
    character
    for low, high in ((1, 0x250), (0x391, 0x3A2), (0x400, 0x481), (0x2010, 0x2028), (0x3041, 0x3060), (0x4E00, 0x4E20))
    for character in map(chr, range(low, high))
]
RARE = ["\u1234", "\u0378", "\U0001f600", "\u2028", "\u0300", "\ufeff", "\u200b"]


def conversations(count: int, characters, seed: int):
    draw = random.Random(seed)

    def text():
        return "".join(draw.choices(characters, k=draw.randint(1, 50))).strip() or "x"

    for _ in range(count):
        yield [{"role": role, "content": text()} for _ in range(draw.randint(1, 3)) for role in ("user", "assistant")]


@pytest.mark.parametrize("choice", ["llama3", "plain"])
@pytest.mark.parametrize("characters", [CHARACTERS, CHARACTERS + RARE], ids=["common", "rare"])
def test_remembered_pieces_are_what_tokenizers_makes(choice, characters):
    tokenizer = tiny_tokenizer()
    apply_chat_template_choice(tokenizer, choice)
    renderer = ChatRenderer(tokenizer.chat_template, tokenizer.special_tokens_map)
    encoder = TokenEncoder(tokenizer.backend_tokenizer)
    assert encoder.remembers
    texts, spans = zip(*map(renderer.render, conversations(500, characters, seed=7)), strict=True)
    whole = encoder.encode_whole(texts, spans)
    assert encoder.encode(texts, spans) == whole
    fast = [encoder._encode_pieces(text, marked) for text, marked in zip(texts, spans, strict=True)]
    agreed = [one == other for one, other in zip(fast, whole, strict=True) if one is not None]
    assert all(agreed) and len(agreed) > 450
    assert min(encoded.trained_tokens for encoded in whole) > 0


def test_spans_that_cut_a_piece_are_left_to_tokenizers():
    encoder = TokenEncoder(tiny_tokenizer().backend_tokenizer)
    text = "question answering"
    assert encoder._encode_pieces(text, [(12, 18)]) is None
    assert encoder.encode([text], [[(12, 18)]]) == encoder.encode_whole([text], [[(12, 18)]])


def test_forgetting_pieces_changes_nothing(monkeypatch):
    encoder = TokenEncoder(tiny_tokenizer().backend_tokenizer)
    texts = [" ".join(random.Random(seed).choices(["one", "two", "three", "four", "five"], k=9)) for seed in range(50)]
    monkeypatch.setattr("fitune.data.token_encoder.REMEMBERED_PIECES", 3)
    assert encoder.encode(texts, [[]] * 50) == encoder.encode_whole(texts, [[]] * 50)


@pytest.mark.parametrize("change", ["normalizer", "prefix space", "another split"])
def test_other_kinds_of_tokenizers_are_taken_whole(change):
    backend = tiny_tokenizer().backend_tokenizer
    if change == "normalizer":
        backend.normalizer = normalizers.NFC()
    elif change == "prefix space":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    encoder = TokenEncoder(backend)
    assert not encoder.remembers
    assert encoder.encode(["cafe\u0301 12"], [[(0, 4)]]) == encoder.encode_whole(["cafe\u0301 12"], [[(0, 4)]])


def test_packing_equals_that_of_trl(tmp_path):
    """The same examples in the same rows in the same order, those that are too long cut."""
    datasets = pytest.importorskip("datasets")
    from trl import pack_dataset

    draw = random.Random(3)
    lengths = [draw.choice([draw.randint(1, 30), draw.randint(1, 220)]) for _ in range(2500)]
    ids = [[number] * length for number, length in enumerate(lengths)]
    packed = pack_dataset(datasets.Dataset.from_dict({"input_ids": ids}), seq_length=200, strategy="bfd")
    write_layout(tmp_path / "packed.arrow", lay_out(np.array(lengths), np.zeros(2500, bool), 200, packing=True))
    layout = Layout(tmp_path / "packed.arrow")
    assert len(layout) == len(packed)
    for number, row in enumerate(packed):
        assert [stop - start for _, start, stop in layout[number]] == row["seq_lengths"]
        assert [example for example, start, stop in layout[number] for _ in range(start, stop)] == row["input_ids"]


def test_texts_are_split_and_conversations_cut():
    lengths, is_text = np.array([5, 10, 0, 23, 11]), np.array([False, True, True, True, False])
    layout = Layout(lay_out(lengths, is_text, 10, packing=False))
    pieces = [layout[number] for number in range(len(layout))]
    assert pieces == [[(0, 0, 5)], [(1, 0, 10)], [(3, 0, 10)], [(3, 10, 20)], [(3, 20, 23)], [(4, 0, 10)]]


def test_a_piece_of_a_row_has_its_own_labels(tmp_path):
    """Tokens 2, 3, 7 and 8 of the second row are trained; its piece begins at 2, and nothing stands before that."""
    ids, edges = np.arange(13, dtype=np.int32), np.array([0, 1, 2, 4, 7, 9], np.int32)
    batch = TokenBatch(ids, np.array([3, 10]), edges, np.array([1, 2]), np.array([False, True]))
    write_tokens(tmp_path / "tokens.arrow", [batch])
    tokens = TokenFile(tmp_path / "tokens.arrow")
    found, labels = tokens.read(1, 2, 8)
    assert found.tolist() == [5, 6, 7, 8, 9, 10]
    assert labels.tolist() == [-100, 6, -100, -100, -100, 10]


def test_writing_them_does_not_import_pandas(tmp_path):
    """Half a second and 34 MiB, for columns of numbers."""
    program = (
        "import sys; import numpy as np; from pathlib import Path\n"
        "from fitune.data.packing import lay_out, write_layout\n"
        "from fitune.data.token_file import TokenBatch, write_tokens\n"
        "one, two, no = np.array([1]), np.array([0, 1], np.int32), np.array([False])\n"
        "write_tokens(Path('tokens.arrow'), [TokenBatch(two[:1], one, two, one, no)])\n"
        "write_layout(Path('packed.arrow'), lay_out(one, no, 8, packing=True))\n"
        "assert 'pyarrow' in sys.modules and 'pandas' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)
    assert TokenFile(tmp_path / "tokens.arrow").ids(0).tolist() == [0]


def test_statistics():
    tokens, trained = np.array([1, 2, 3, 4, 5, 600], np.uint32), np.array([0, 1, 1, 2, 2, 300], np.uint32)
    assert token_statistics(tokens, trained) == {
        "total": 615,
        "trained": 306,
        "trained_share": round(306 / 615, 4),
        "mean": 102.5,
        "p50": 4,
        "p95": 600,
        "max": 600,
        "histogram": {"1": 1, "2": 1, "4": 2, "8": 1, "1024": 1},
    }


def test_first_occurrences():
    hashes = np.array([[5, 1], [5, 2], [5, 1], [7, 7], [5, 1], [5, 2]], np.uint64)
    is_test = np.array([False, False, True, False, False, False])
    first, shared = _first_occurrences(hashes, is_test)
    assert first.tolist() == [False, True, True, True, False, False]
    assert shared.tolist() == [True, False, False, False, True, False]


def test_repeated_rows_are_written_pass_by_pass(tmp_path):
    (tmp_path / "rows").write_bytes(b"a\nbb\nccc\n")
    store = RowStore.__new__(RowStore)
    store._rows, store.sizes = tmp_path / "rows", np.array([2, 3, 4], np.uint32)
    store.write(tmp_path / "out", np.array([1, 3, 2], np.uint16))
    assert (tmp_path / "out").read_bytes() == b"a\nbb\nccc\nbb\nccc\nbb\n"


def test_what_is_sampled_does_not_depend_on_what_is_held_out():
    """Half of the rows that are left, though those that were held out are the ones with the lowest numbers."""
    rows = 20_000
    store = RowStore.__new__(RowStore)
    store.hashes = np.random.default_rng(5).integers(0, 2**64, (rows, 2), np.uint64, endpoint=False)
    store.is_test, store.source = np.zeros(rows, bool), np.zeros(rows, np.uint16)
    selection = store.select(seed=3, weights=[0.5], split_fraction=[0.3])
    left = rows - int(selection.test.sum())
    assert left == 0.7 * rows
    assert abs((selection.train_repeats > 0).sum() / left - 0.5) < 6 * (0.25 / left) ** 0.5
