"""The small files of a model folder: which they are, how they are copied."""

from collections.abc import Callable
from pathlib import Path

COPY_BYTES = 16 * 2**20
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.*"]
TEMPLATES_BY_NAME = "additional_chat_templates"
LICENCE_FILES = ["LICENSE*", "USE_POLICY*", "NOTICE*"]


def matching(folder: Path, patterns: list[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def copy_file(file: Path, folder: Path, on_bytes: Callable[[int], object] = lambda _: None) -> None:
    """Content only, in blocks: the copy's mode follows the umask, and a link becomes a file."""
    with file.open("rb") as source, (folder / file.name).open("wb") as target:
        while block := source.read(COPY_BYTES):
            target.write(block)
            on_bytes(len(block))


def copy_templates_by_name(source: Path, folder: Path) -> None:
    """Those beside the default one, such as for tools, where transformers looks for them."""
    for file in sorted((source / TEMPLATES_BY_NAME).glob("*.jinja")):
        (folder / TEMPLATES_BY_NAME).mkdir(exist_ok=True)
        copy_file(file, folder / TEMPLATES_BY_NAME)
