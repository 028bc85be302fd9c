"""Where rows come from: local files and folders of them, what `datasets` saved, Hub datasets; which split is which."""

import json
import re
from dataclasses import replace
from pathlib import Path

from fitune.data.hub_dataset import Splits, names_of, open_hub_dataset
from fitune.data.source_file import COMPRESSED, SUFFIXES, SourceFile, open_file
from fitune.errors import UsageError, nearest

_TOKENS_OF_PREPARE = (".tokens.arrow", ".packed.arrow")


def open_source(dataset: str, revision: str | None, train_split: str, test_split: str | None) -> Splits:
    """The splits of a local file, a folder or a Hub id. Raises UsageError for what is neither.

    `train_split` and `test_split` may name several, as `datasets` does: `train+validation`.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _open_folder(path, train_split, test_split)
    if path.exists():
        return _splits_in_file(open_file(path), train_split, test_split)
    refuse_missing_file(dataset)
    return open_hub_dataset(dataset, revision, train_split, test_split)


def refuse_missing_file(dataset: str) -> None:
    """Raises UsageError if it is no file or folder here, and cannot be a Hub id either."""
    path = Path(dataset).expanduser()
    if path.exists():
        return
    if _looks_like_a_path(dataset):
        raise UsageError(f"{dataset}: no such file{_nearby_file(path)}")
    if len(path.parts) != 2:
        raise UsageError(f"{dataset}: no such file{_nearby_file(path)}; a dataset on the Hub is ORGANISATION/NAME")


def _splits_in_file(file: SourceFile, train_split: str, test_split: str | None) -> Splits:
    """A file is one split, but for an object of JSON whose keys are the splits' names."""
    train, test = ([name for name in names_of(split) if name in file.lists] for split in (train_split, test_split))
    if len(file.lists) < 2 or not train:
        return Splits([file], [])
    ignored = [f"{file.name}: '{name}'" for name in file.lists if name not in (*train, *test)]
    return Splits(
        [replace(file, key=name) for name in train],
        [replace(file, key=name) for name in test],
        has_named_splits=True,
        ignored=ignored,
    )


def _open_folder(folder: Path, train_split: str, test_split: str | None) -> Splits:
    if (folder / "dataset_dict.json").is_file():
        return _saved_splits(folder, train_split, test_split)
    if (folder / "state.json").is_file():
        return Splits(_saved_files(folder), [])
    return _split_files(folder, train_split, test_split)


def _saved_splits(folder: Path, train_split: str, test_split: str | None) -> Splits:
    """What `DatasetDict.save_to_disk` wrote: a folder for each split."""
    available = _names_of_splits(folder / "dataset_dict.json")
    for name in names_of(train_split):
        if name not in available:
            raise UsageError(
                f"{folder}: saved by datasets, no split '{name}'{nearest(name, available)}; set data.train_split"
            )
    train, test = (
        [file for name in names_of(split) if name in available for file in _saved_files(folder / name)]
        for split in (train_split, test_split)
    )
    read = {*names_of(train_split), *names_of(test_split)}
    ignored = [str(folder / name) for name in available if name not in read]
    return Splits(train, test, has_named_splits=True, ignored=ignored)


def _saved_files(folder: Path) -> list[SourceFile]:
    """What `Dataset.save_to_disk` wrote, by its names; not what `datasets` may have left in its cache there."""
    files = sorted(folder.glob("data-*-of-*.arrow"))
    wanted = int(files[0].stem.rpartition("-")[2]) if files else 1
    if len(files) != wanted:
        raise UsageError(f"{folder}: saved by datasets, and {len(files)} of its {wanted} Arrow files are there")
    return [open_file(file) for file in files]


def _names_of_splits(file: Path) -> list[str]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file}: not what datasets' save_to_disk writes: {error!r}; save it again") from None


def _split_files(folder: Path, train_split: str, test_split: str | None) -> Splits:
    """Files whose name or parent folder begins with the split's name belong to it; without such names all are train."""
    names = (*SUFFIXES, *(suffix + packed for suffix in SUFFIXES for packed in COMPRESSED))
    everything = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    paths = [path for path in everything if path.name.lower().endswith(names) and not _is_about_data(path)]
    if not paths:
        raise UsageError(f"{folder}: no data files in this folder; allowed: {', '.join(SUFFIXES)}")
    test = [path for path in paths if belongs(path.relative_to(folder), test_split)]
    train = [path for path in paths if belongs(path.relative_to(folder), train_split)]
    in_test = set(test)
    if both := [path for path in train if path in in_test]:
        raise UsageError(f"{both[0]}: its name says both '{train_split}' and '{test_split}'; rename the file or folder")
    if not train:
        train = [path for path in paths if path not in in_test]
    if not train:
        raise UsageError(f"{folder}: every file belongs to the split '{test_split}', none to '{train_split}'")
    read = in_test.union(train)
    ignored = [str(path) for path in everything if path not in read]
    return Splits([open_file(path) for path in train], [open_file(path) for path in test], ignored=ignored)


def _is_about_data(path: Path) -> bool:
    """What `prepare` and `datasets` write beside rows."""
    return path.name.endswith(_TOKENS_OF_PREPARE) or (
        path.name in ("report.json", "state.json", "dataset_info.json", "dataset_infos.json")
        and any(path.parent.glob("*.arrow"))
    )


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def belongs(path: Path, split: str | None) -> bool:
    """Whether the name of a file, or of a folder that it lies in, says that it is of a split."""
    return any(re.match(rf"{re.escape(name)}(?:[-_.]|$)", part) for name in names_of(split) for part in path.parts)


def _looks_like_a_path(dataset: str) -> bool:
    return dataset.startswith((".", "/", "~")) or dataset.count("/") > 1 or dataset.endswith((*SUFFIXES, *COMPRESSED))


def _nearby_file(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    suggestion = nearest(path.name, names)
    return suggestion if "did you mean" in suggestion else ""
