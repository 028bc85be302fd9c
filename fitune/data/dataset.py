"""Rows as training takes them, read from memory-mapped tokens, and the tokenizer they were made with."""

from pathlib import Path

from fitune.config.recipe import Recipe
from fitune.data.chat_template import apply_chat_template_choice, read_tokenizer
from fitune.data.packing import Layout
from fitune.data.token_file import IGNORED, TokenFile

FILLER_TOKENS = 2
"Of a row that has no labels, and counts nothing."


def load_tokenizer(recipe: Recipe, base_folder: Path):
    """The base's transformers tokenizer with the recipe's chat template and a pad token."""
    tokenizer = read_tokenizer(base_folder)
    apply_chat_template_choice(tokenizer, recipe.data.chat_template)
    return tokenizer


class TokenisedRows:
    """A map-style dataset: `rows[i]` has `input_ids` and `labels`, and where packed `seq_lengths` of its examples.

    Nothing is read before it is asked for, so it is there at once, however many rows there are.
    """

    def __init__(
        self, tokens: TokenFile, layout: Layout, packing: bool, fillers: int = 0, filler_id: int | None = None
    ):
        self.tokens, self.layout, self.packing = tokens, layout, packing
        self._fillers, self._filler_id = fillers, filler_id

    @property
    def column_names(self) -> list[str]:
        return ["input_ids", "labels", *(["seq_lengths"] if self.packing else [])]

    def __len__(self) -> int:
        return len(self.layout) + self._fillers

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        if number >= len(self.layout):
            return self._row([([self._filler_id] * FILLER_TOKENS, [IGNORED] * FILLER_TOKENS)])
        pieces = (self.tokens.read(*piece) for piece in self.layout[number])
        return self._row([(ids.tolist(), labels.tolist()) for ids, labels in pieces])

    def filled_up(self, multiple: int, token_id: int, *, one_more: bool = False) -> "TokenisedRows":
        """With rows that have no labels, so count nothing, up to a multiple of the global batch.

        Otherwise accelerate repeats rows of the epoch's start in its last batch, how many depending on the processes.
        With `one_more` another such row follows.
        """
        fillers = -len(self.layout) % multiple + one_more
        return TokenisedRows(self.tokens, self.layout, self.packing, fillers, token_id)

    def _row(self, examples: list[tuple[list[int], list[int]]]) -> dict[str, list[int]]:
        names = enumerate(("input_ids", "labels"))
        row = {name: [value for example in examples for value in example[n]] for n, name in names}
        return row | ({"seq_lengths": [len(ids) for ids, _ in examples]} if self.packing else {})
