"""Hub datasets: the loading code against `datasets` itself on local rows of no_robots' schema; errors as one line."""

import datasets
import huggingface_hub
import pytest
from huggingface_hub import errors

from fitune.config.recipe import Data
from fitune.data.prepare import prepare
from fitune.errors import FituneError, UsageError

COMMIT = "e6f9a4ac5c08faea2a6ad6ea0ee2d5a9b2a3ae35"


def no_robots(start: int, stop: int) -> datasets.Dataset:
    """Rows with the columns of HuggingFaceH4/no_robots."""
    return datasets.Dataset.from_list(
        [
            {
                "prompt": f"Question {number}?",
                "prompt_id": f"{number:064x}",
                "messages": [
                    {"role": "user", "content": f"Question {number}?"},
                    {"role": "assistant", "content": f"Answer {number}."},
                ],
                "category": "Open QA",
            }
            for number in range(start, stop)
        ]
    )


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one dataset, HuggingFaceH4/no_robots; what was asked of it is in the list."""
    asked = []
    splits = {"train": no_robots(0, 5000), "test": no_robots(4990, 5100)}

    class Api:
        def dataset_info(self, dataset, revision=None, timeout=None):
            asked.append(("commit", dataset, revision))
            return type("Info", (), {"sha": COMMIT})

    def load_dataset(dataset, revision=None, split=None):
        asked.append(("load", dataset, revision, split))
        return splits[split]

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda dataset, revision=None: list(splits))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def data(**fields) -> Data:
    return Data(dataset="HuggingFaceH4/no_robots", prepared="x", **fields)


def test_rows_of_a_pinned_commit(hub, tmp_path):
    report = prepare(data(revision="main"), tmp_path / "out", workers=2)
    assert (report["train_rows"], report["test_rows"]) == (4990, 110)
    assert report["dropped"] == {"shared_with_test": 10}
    assert report["source"]["revision"] == COMMIT and report["source"]["sha256_of"] == "rows"
    assert len(report["source"]["sha256"]) == 64
    assert hub[0] == ("commit", "HuggingFaceH4/no_robots", "main")
    assert {call[2] for call in hub[1:]} == {COMMIT}


def test_bad_rows_are_named_by_split_and_row(hub, tmp_path, monkeypatch):
    bad = datasets.concatenate_datasets(
        [no_robots(0, 3000), datasets.Dataset.from_list([no_robots(0, 1)[0] | {"messages": []}])]
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: bad)
    with pytest.raises(UsageError, match=r"HuggingFaceH4/no_robots\[train\]:3001: no turn of the assistant"):
        prepare(data(), tmp_path / "out", workers=1)


def test_missing_test_split_is_taken_by_seed_and_said(hub, tmp_path):
    report = prepare(data(test_split="tset"), tmp_path / "out", workers=1)
    assert (report["train_rows"], report["test_rows"]) == (4750, 250)
    assert "HuggingFaceH4/no_robots has no split 'tset': test rows were taken from the others" in report["notes"]


def test_mistyped_train_split(hub, tmp_path):
    with pytest.raises(UsageError, match="no split 'trian'; did you mean 'train'"):
        prepare(data(train_split="trian"), tmp_path / "out")


def http_error(kind, status: int):
    response = type("Response", (), {"status_code": status, "headers": {}, "request": None})()
    return kind("refused", response=response)


@pytest.mark.parametrize(
    ("error", "expected", "kind"),
    [
        (http_error(errors.RepositoryNotFoundError, 404), "check the name, or run `hf auth login`", UsageError),
        (http_error(errors.GatedRepoError, 403), "accept the terms at https://huggingface.co/datasets/", UsageError),
        (http_error(errors.RevisionNotFoundError, 404), "no revision 'v9'", UsageError),
        (http_error(errors.HfHubHTTPError, 401), "the Hub refused the login (HTTP 401)", UsageError),
        (errors.OfflineModeIsEnabled("offline\nmode"), "give a local file, or set HF_HUB_OFFLINE=1", UsageError),
        (ConnectionError("no route"), "out of reach (no route)", UsageError),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset"), "accept the terms", UsageError),
        (RuntimeError("boom\nmore"), "cannot be read: RuntimeError: boom", FituneError),
    ],
)
def test_errors_are_one_line(hub, tmp_path, monkeypatch, error, expected, kind):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(FituneError) as caught:
        prepare(data(revision="v9"), tmp_path / "out")
    message = str(caught.value)
    assert type(caught.value) is kind and expected in message and "\n" not in message
    assert message.startswith("HuggingFaceH4/no_robots: ")


def test_offline_reads_the_cache_without_asking_for_the_commit(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    report = prepare(data(revision="abc"), tmp_path / "out", workers=1)
    assert report["source"]["revision"] == "abc" and {call[0] for call in hub} == {"load"}
