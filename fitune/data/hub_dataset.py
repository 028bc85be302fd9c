"""Datasets on the Hub, through the `datasets` library: pinned to a commit, every failure one line."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fitune.data.file_formats import ROWS_PER_TABLE, Table, first_line
from fitune.errors import FituneError, UsageError, nearest

TIMEOUT_SECONDS = 20


@dataclass(frozen=True)
class Splits:
    """A source's rows, in files or splits that yield `chunks()`; `test` is empty where it has no such split."""

    train: list
    test: list
    revision: str | None = None
    "Commit on the Hub that was read."
    has_named_splits: bool = False
    "Whether a missing test split is worth a word: a dataset has splits, a file has none."
    ignored: list[str] = field(default_factory=list)
    "Data files in a folder that belong to neither split."


@dataclass(frozen=True)
class HubSplit:
    """One split of a dataset in the Hub's cache, memory-mapped."""

    name: str
    rows: Any
    "datasets.Dataset"

    def chunks(self) -> Iterator[Table]:
        first_row = 1
        for table in self.rows.with_format("arrow").iter(batch_size=ROWS_PER_TABLE):
            yield Table(first_row, table)
            first_row += table.num_rows


def open_hub_dataset(dataset: str, revision: str | None, train_split: str, test_split: str | None) -> Splits:
    """Downloads what is not in the cache yet. Raises UsageError, FituneError where the download itself failed."""
    import datasets

    try:
        commit = _commit(dataset, revision)
        available = datasets.get_dataset_split_names(dataset, revision=commit)
        for name in names_of(train_split):
            if name not in available:
                raise UsageError(f"{dataset}: no split '{name}'{nearest(name, available)}; set data.train_split")
        train, test = (
            [
                HubSplit(f"{dataset}[{name}]", datasets.load_dataset(dataset, revision=commit, split=name))
                for name in names_of(split)
                if name in available
            ]
            for split in (train_split, test_split)
        )
    except UsageError:
        raise
    except Exception as error:
        raise _explained(error, dataset, revision) from None
    return Splits(train, test, commit, has_named_splits=True)


def names_of(split: str | None) -> list[str]:
    """Of `train+validation`, as `datasets` writes several splits, each name; none of None."""
    return split.split("+") if split else []


def _commit(dataset: str, revision: str | None) -> str | None:
    """The commit that `revision` names now. Asked first: it fails at once where `datasets` would try for a minute."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return revision
    return HfApi().dataset_info(dataset, revision=revision, timeout=TIMEOUT_SECONDS).sha


def _explained(error: Exception, dataset: str, revision: str | None) -> FituneError:
    """What to do about an error of `datasets` or `huggingface_hub`."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors

    url = f"https://huggingface.co/datasets/{dataset}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or "gated" in str(error):
        return UsageError(f"{dataset}: no access; accept the terms at {url} and run `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{dataset}: no revision '{revision}'; see {url}/commits/main")
    if isinstance(error, (errors.RepositoryNotFoundError, DatasetNotFoundError)):
        return UsageError(f"{dataset}: no such file, nor found at {url}; check the name, or run `hf auth login`")
    if status in (401, 403):
        return UsageError(
            f"{dataset}: the Hub refused the login (HTTP {status}); run `hf auth login` with a valid token"
        )
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{dataset}: no such file, and not a name on the Hub: {first_line(error)}")
    if isinstance(error, OSError) or type(error).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout"):
        return UsageError(
            f"{dataset}: no such file, and the Hub is out of reach ({first_line(error)}); give a local file, or set "
            "HF_HUB_OFFLINE=1 if the dataset is in the cache"
        )
    return FituneError(f"{dataset}: cannot be read: {type(error).__name__}: {first_line(error)}")
