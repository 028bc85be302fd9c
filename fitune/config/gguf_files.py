"""GGUF files, given where something else is wanted: what they are, and what can be done with one."""

from pathlib import Path

from fitune.config.command_name import command
from fitune.errors import UsageError

SUFFIX = ".gguf"


def gguf_files(given: Path) -> list[Path]:
    """`given` itself if it is named as a GGUF file, else those in the folder, the smallest first."""
    if given.suffix == SUFFIX and not given.is_dir():
        return [given]
    return sorted(given.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_size)


def refuse_gguf(given: Path, wanted: str) -> None:
    """UsageError for a GGUF file or a folder of some, which says what they are for; `wanted`: such as "run".

    A model's folder may have some beside its own files.
    """
    files = [file for file in gguf_files(given) if file.is_file()]
    if not files or (given / "config.json").is_file():
        return
    what = "a GGUF file" if files == [given] else "a folder of GGUF files"
    raise UsageError(
        f"{given}: {what}, no {wanted}: `{command('generate', files[0], '--serve', '8000')}` starts llama.cpp with it, "
        f"`{command('eval', files[0], '--data', 'FOLDER')}` measures it"
    )
