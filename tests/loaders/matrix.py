"""Loader by method and base: what each loader made of each model, in one table after `make loaders`."""

from dataclasses import dataclass

METHODS = ["full", "lora", "qlora"]
BASES = {"llama": "Llama 3 style, random weights", "real": "SmolLM2-135M"}
CAPTION = "mean loss: difference and its bound; tokens of the greedy answer that are the same"


@dataclass(frozen=True)
class Cell:
    """One loader's losses of one model, beside those that they are compared with."""

    loader: str
    base: str
    method: str
    difference: float
    "Of the mean losses of the same tokens."
    bound: float
    same: int | None = None
    "Tokens of the greedy answer before the two part."
    tokens: int | None = None
    "In the answer; None where only losses are read."

    def __str__(self) -> str:
        answer = "" if self.tokens is None else f", {self.same}/{self.tokens}"
        return f"{self.difference:.1e} of {self.bound:.1e}{answer}"


def matrix(cells: list[Cell]) -> str:
    """A table for each base, in Markdown."""
    return "\n\n".join(_table(base, [cell for cell in cells if cell.base == base]) for base in BASES)


def _table(base: str, cells: list[Cell]) -> str:
    found = {(cell.loader, cell.method): str(cell) for cell in cells}
    rows = [["loader", *METHODS]]
    for loader in dict.fromkeys(cell.loader for cell in cells):
        rows.append([loader, *(found.get((loader, method), "") for method in METHODS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"{BASES[base]} ({CAPTION})", "", lines[0], rule, *lines[1:]])
