import json

import pytest
import torch
from ranks import run_alone, run_ranks, train_here

from fitune.config.recipe import Base
from fitune.errors import UsageError
from fitune.training.tuned import tuned_base_folder
from fitune.weights import base_identity
from fitune.weights.base_identity import (
    BASE_RECORD,
    BaseRecord,
    base_fingerprint,
    base_mismatch,
    identify_base,
    read_base_record,
    write_base_record,
)
from fitune.weights.safetensors_files import Checkpoint, CheckpointWriter, TensorSpec

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "meta-llama/Meta-Llama-3-8B"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    _write(folder, {"weight": torch.arange(4096, dtype=torch.float32)})
    return folder


def _write(folder, tensors):
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = CheckpointWriter(folder, specs)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


def _fingerprint(folder):
    with Checkpoint(folder) as checkpoint:
        return base_fingerprint(checkpoint)


@pytest.mark.parametrize("position", [0, 2048, 4095])
def test_fingerprint_sees_changed_weights(model, position):
    before = _fingerprint(model)
    weight = torch.arange(4096, dtype=torch.float32)
    weight[position] += 1
    _write(model, {"weight": weight})
    after = _fingerprint(model)
    assert (before["shapes"], before["tensors"]) == (after["shapes"], after["tensors"])
    assert before["sample"] != after["sample"]


def test_fingerprint_reads_a_sample_only(tmp_path):
    _write(tmp_path, {"big": torch.zeros(10**6), "small": torch.zeros(3)})
    with Checkpoint(tmp_path) as checkpoint:
        base_fingerprint(checkpoint)
        assert checkpoint.bytes_read == 3 * base_identity.SAMPLE_BYTES + 12


def test_fingerprint_does_not_depend_on_sharding(model, tmp_path):
    tensors = {"b": torch.ones(100), "a": torch.zeros(50)}
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, limit in ((one, 10**9), (two, 300)):
        folder.mkdir()
        writer = CheckpointWriter(folder, [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], limit)
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()
    assert _fingerprint(one) == _fingerprint(two)


def test_base_record_round_trip_and_mismatches(model, tmp_path):
    fingerprint = _fingerprint(model)
    assert read_base_record(tmp_path) is None
    write_base_record(tmp_path, BaseRecord(MODEL, COMMIT, fingerprint, "nf4"))
    written = json.loads((tmp_path / BASE_RECORD).read_text())
    assert written == {"model": MODEL, "revision": COMMIT, "fingerprint": fingerprint, "computed_in": "nf4"}
    record = read_base_record(tmp_path)
    assert record == BaseRecord(MODEL, COMMIT, fingerprint, "nf4")
    assert base_mismatch(record, fingerprint) is None
    assert "not the weights" in base_mismatch(record, fingerprint | {"sample": "x"})
    assert "cannot be compared" in base_mismatch(record, fingerprint | {"tensors": "x", "sample": "x"})
    assert "other tensors or shapes" in base_mismatch(record, {"shapes": "x", "tensors": "x", "sample": "x"})


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "3", json.dumps({"model": "a"}), json.dumps({"model": "a", "revision": None, "fingerprint": 3})],
)
def test_a_broken_base_record_is_refused(tmp_path, content):
    (tmp_path / BASE_RECORD).write_text(content)
    with pytest.raises(UsageError, match="not a readable record"):
        read_base_record(tmp_path)


def test_the_commit_of_a_hub_snapshot_is_recorded(model, tmp_path):
    snapshot = tmp_path / "models--meta-llama--Meta-Llama-3-8B" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    record = identify_base(Base(model=MODEL, revision="main"), snapshot)
    assert record == BaseRecord(MODEL, COMMIT, _fingerprint(snapshot))


TRAINING = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(("method", "computed_in"), [("lora", "stored"), ("qlora", "nf4")])
def test_training_records_the_base_in_every_adapter_and_other_bases_are_refused(
    method, computed_in, tiny_base, uneven_base, make_run, tmp_path
):
    run = make_run(tiny_base, tmp_path / "run", method, processes=2, training=TRAINING)
    run_ranks(train_here, 2, run)
    expected = BaseRecord(str(tiny_base), None, _fingerprint(tiny_base), computed_in)
    for adapter in (run.result_folder, run.folder / "checkpoints" / "checkpoint-1" / "adapter"):
        assert read_base_record(adapter) == expected
    assert tuned_base_folder(run, tiny_base) == tiny_base
    with pytest.raises(UsageError, match="has other tensors or shapes than the adapter's base") as caught:
        tuned_base_folder(run, uneven_base)
    assert "\n" not in str(caught.value)
    (run.result_folder / BASE_RECORD).unlink()
    assert tuned_base_folder(run, uneven_base) == uneven_base  # nothing to compare with


def test_method_full_has_no_base_to_remember(tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path / "run", "full", training=TRAINING)
    run_alone(train_here, run)
    assert not list(run.folder.rglob(BASE_RECORD))
    assert tuned_base_folder(run, tiny_base) == run.result_folder
