"""The folder of a run's result, for tests of what is done before its files are read."""

from pathlib import Path

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def empty_adapter(folder: Path) -> Path:
    """An adapter's folder with its files, and nothing in them."""
    folder.mkdir(parents=True)
    for name in ADAPTER:
        (folder / name).touch()
    return folder
