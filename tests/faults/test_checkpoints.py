"""A save cut off at any stage, files damaged afterwards, a run that changed: what resume makes of it."""

import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, train_here

from fitune.config import run as runs
from fitune.errors import UsageError
from fitune.launching.run_folder import nothing_left, open_run_folder
from fitune.output_folder import checkpoints
from fitune.training import checkpoint, manifest, saving_trainer
from fitune.training.manifest import Identity, find_damage, read_manifest, refuse_another_identity

STEPS = 4
TRAINING = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
STAGES = {
    "before the state is written": (saving_trainer, "write_training_state", "before"),
    "before the manifest": (checkpoint, "write_manifest", "before"),
    "within the manifest": (manifest.Path, "write_text", "before"),
    "before the rename": (checkpoint, "rename_when_whole", "before"),
    "after the rename": (checkpoint, "rename_when_whole", "after"),
    "before an old one is removed": (shutil, "rmtree", "before"),
    "while an old one is removed": (shutil, "rmtree", "half"),
}


def _killed_in(stage: str, run) -> None:
    """Trains; rank 0 is killed with SIGKILL at that stage of the save after step 3."""
    owner, name, moment = STAGES[stage]
    original = getattr(owner, name)

    def cut_off(path, *args, **kwargs):
        of_this_save = Path(path).name == "checkpoint-1" if name == "rmtree" else "checkpoint-3" in str(path)
        if not of_this_save:
            return original(path, *args, **kwargs)
        if moment == "after":
            original(path, *args, **kwargs)
        if moment == "half":
            next(Path(path).rglob("*.safetensors")).unlink()
        return os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "0":
        setattr(owner, name, cut_off)
    train_here(run)


def _damages(folders: list[Path]) -> list[str | None]:
    torch.distributed.init_process_group("gloo")
    return [find_damage(folder) for folder in folders]


@pytest.fixture(scope="module")
def finished(tiny_base, make_run, tmp_path_factory):
    """A run of 4 steps that was told to keep two checkpoints."""
    run = make_run(tiny_base, tmp_path_factory.mktemp("saves") / "run", "lora", training=TRAINING)
    run_ranks(train_here, 1, run)
    return run


@pytest.fixture(scope="module")
def finished_by_two(tiny_base, make_run, tmp_path_factory):
    run = make_run(tiny_base, tmp_path_factory.mktemp("two") / "run", "lora", processes=2, training=TRAINING)
    run_ranks(train_here, 2, run)
    return run


@pytest.mark.parametrize(("stage", "async_save"), [*((stage, True) for stage in STAGES), ("before the rename", False)])
def test_a_save_cut_off_at_any_stage_costs_no_checkpoint(
    stage, async_save, finished_by_two, tiny_base, make_run, tmp_path
):
    """In the thread that writes beside training; without it training calls the same function, as one stage shows."""
    run = make_run(tiny_base, tmp_path / "run", "lora", processes=2, training=TRAINING, async_save=async_save)
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_ranks(_killed_in, 2, stage, run)
    left = checkpoints(run.folder / "checkpoints")
    whole = [path.name for path, damage in zip(left, run_ranks(_damages, 1, left)[0], strict=True) if not damage]
    expected = ["checkpoint-2", "checkpoint-3"] if "rename" in stage and "after" in stage else ["checkpoint-2"]
    assert set(expected) <= set(whole)
    run_ranks(train_here, 2, run.model_copy(update={"resume": True}))
    adapter = "adapter_model.safetensors"
    assert (run.result_folder / adapter).read_bytes() == (finished_by_two.result_folder / adapter).read_bytes()
    left = [path.name for path in checkpoints(run.folder / "checkpoints")]
    assert left == ["checkpoint-3", "checkpoint-4"]


def test_every_damage_is_named(finished, tmp_path):
    whole = finished.folder / f"checkpoints/checkpoint-{STEPS}"
    saved = read_manifest(whole)
    assert (saved.step, saved.samples) == (STEPS, STEPS * finished.recipe.global_batch_size)
    assert {"torch", "transformers", "peft"} <= set(saved.versions)
    assert set(saved.files) == {str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file()} - {"manifest.json"}
    assert "training_args.bin" not in {Path(name).name for name in saved.files}
    state = "state/rank-00000-of-00001/model.safetensors"

    def truncate(folder):
        os.truncate(folder / state, 1000)

    def flip(folder):
        data = bytearray((folder / state).read_bytes())
        data[-5] ^= 1
        (folder / state).write_bytes(data)

    def of_two_ranks(folder):
        manifest_file = folder / "manifest.json"
        text = manifest_file.read_text().replace("rank-00000-of-00001", "rank-00000-of-00002")
        manifest_file.write_text(
            text.replace('"world_size": 1', '"world_size": 2').replace('"shards": 1', '"shards": 2')
        )

    kinds = {
        f"{state} has 1000 bytes, not {saved.files[state].bytes}": truncate,
        f"{state} has other contents than were written": flip,
        "adapter/adapter_config.json is missing": lambda folder: (folder / "adapter/adapter_config.json").unlink(),
        "no manifest.json: not written by fitune, or never finished": lambda f: (f / "manifest.json").unlink(),
        "state/rank-00001-of-00002/model.safetensors is not in manifest.json": of_two_ranks,
        "manifest.json: Invalid JSON: ": lambda folder: (folder / "manifest.json").write_text("{"),
    }
    folders = [tmp_path / str(number) for number in range(len(kinds))]
    for folder, damage in zip(folders, kinds.values(), strict=True):
        shutil.copytree(whole, folder)
        damage(folder)
    found = run_ranks(_damages, 1, [whole, *folders])[0]
    assert found[0] is None
    for words, expected in zip(found[1:], kinds, strict=True):
        assert words.startswith(expected), words


def test_damage_to_any_file_is_seen_though_ranks_share_the_reading(finished_by_two, tmp_path):
    whole = finished_by_two.folder / f"checkpoints/checkpoint-{STEPS}"
    names = sorted(read_manifest(whole).files)
    assert len(names) > 4
    folders = [tmp_path / str(number) for number in range(len(names))]
    for folder, name in zip(folders, names, strict=True):
        shutil.copytree(whole, folder)
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
    for found in run_ranks(_damages, 2, [whole, *folders]):
        assert found == [None, *(f"{name} has other contents than were written" for name in names)]


def _output_of_resume(run) -> str:
    """What resuming prints to stderr, or the error it ends with."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            train_here(run)
        except UsageError as error:
            return f"{printed.getvalue()}{error}"
    return printed.getvalue()


def test_resume_says_what_it_skips_and_loads_no_pickle(finished, tmp_path):
    """The newest checkpoint's random state is a pickle that would run a command; its hash tells that it was swapped."""
    shutil.copytree(finished.folder, tmp_path / "run")

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    newest = tmp_path / f"run/checkpoints/checkpoint-{STEPS}"
    (newest / "rng_state.pth").write_bytes(pickle.dumps(Command()))
    run = finished.model_copy(update={"output_dir": str(tmp_path / "run"), "resume": True})
    printed = run_ranks(_output_of_resume, 1, run)[0]
    assert f"{newest}: skipped: rng_state.pth has" in printed
    assert not (tmp_path / "executed").exists()
    assert (run.result_folder / "adapter_config.json").is_file()

    older = tmp_path / f"run/checkpoints/checkpoint-{STEPS - 1}"  # now one whose manifest was forged to fit
    shutil.rmtree(newest)
    (older / "rng_state.pth").write_bytes(pickle.dumps(Command()))
    forged = json.loads((older / "manifest.json").read_text())
    forged["files"]["rng_state.pth"] = manifest.describe(older / "rng_state.pth").model_dump()
    (older / "manifest.json").write_text(json.dumps(forged))
    with pytest.raises(RuntimeError, match="Weights only load failed"):
        run_ranks(train_here, 1, run)
    assert not (tmp_path / "executed").exists()


def _copy(finished, folder: Path, **training):
    """The finished run in another folder, to be resumed with other `training:` fields."""
    shutil.copytree(finished.folder, folder)
    recipe = finished.recipe.model_copy(update={"training": finished.recipe.training | training})
    return finished.model_copy(update={"recipe": recipe, "output_dir": str(folder), "resume": True})


def test_damaged_checkpoints_do_not_push_out_whole_ones(finished, tmp_path):
    """Two newer ones are damaged and two are kept: the one resumed from and the new one, whatever their numbers."""
    run = _copy(finished, tmp_path / "run", max_steps=STEPS + 1)
    shutil.rmtree(run.result_folder)
    folder = run.folder / "checkpoints"
    for number in (7, 8):
        shutil.copytree(folder / f"checkpoint-{STEPS}", folder / f"checkpoint-{number}")
        (folder / f"checkpoint-{number}/trainer_state.json").write_text("{}")
    (folder / ".checkpoint-9.partial").mkdir()
    run_ranks(train_here, 1, run)
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{STEPS}", f"checkpoint-{STEPS + 1}"]
    assert not list(folder.glob(".checkpoint-*"))
    assert {p.name for p in folder.glob("damaged-*")} == {"damaged-checkpoint-7", "damaged-checkpoint-8"}


def test_a_torn_last_line_of_the_metrics_does_not_stop_a_resume(finished, tmp_path):
    run = _copy(finished, tmp_path / "run", max_steps=STEPS + 1)
    with (run.folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    run_ranks(train_here, 1, run)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]


def test_a_resumed_run_takes_a_lower_learning_rate(finished, tmp_path):
    """And what a checkpoint holds with the optimizer's state may not change."""
    rates = {}
    for rate in (2e-5, 1e-7):
        run = _copy(
            finished, tmp_path / str(rate), max_steps=STEPS + 1, learning_rate=rate, lr_scheduler_type="constant"
        )
        run_ranks(train_here, 1, run)
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        rates[rate] = [line["learning_rate"] for line in lines if "loss" in line][-1]
    assert rates == {rate: pytest.approx(rate, rel=1e-6) for rate in rates}
    changed = _copy(finished, tmp_path / "sgd", optim="sgd")
    (changed.folder / "run.yaml").write_text(runs.dump(finished))
    with pytest.raises(UsageError, match=r"started with training\.optim adamw_torch_fused, not sgd"):
        open_run_folder(changed, resume=True).__enter__()


@pytest.mark.parametrize(
    ("block", "changed", "named"),
    [
        ("data", {"prepared": "elsewhere"}, r"with data\.prepared \S+, not elsewhere"),
        ("lora", {"r": 5}, r"with lora\.r 4, not 5"),
        (None, {"seed": 5}, r"with seed \d+, not 5"),
        (None, {"lora": None, "method": "full"}, r"with method lora, not full"),
    ],
)
def test_a_changed_recipe_names_the_field(block, changed, named, finished, tmp_path):
    run = _copy(finished, tmp_path / "run")
    (run.folder / "run.yaml").write_text(runs.dump(finished))
    update = {block: getattr(run.recipe, block).model_copy(update=changed)} if block else changed
    changed_run = run.model_copy(update={"recipe": run.recipe.model_copy(update=update)})
    with pytest.raises(UsageError, match=named):
        open_run_folder(changed_run, resume=True).__enter__()


def test_before_the_first_checkpoint_a_run_may_be_changed(finished, tmp_path):
    """A wrong setting that the library refuses after the start must not make the folder useless."""
    run = _copy(finished, tmp_path / "run", optim="sgd")
    shutil.rmtree(run.folder / "checkpoints")
    (run.folder / "run.yaml").write_text(runs.dump(finished))
    with open_run_folder(run, resume=True):
        pass
    assert runs.load(run.folder / "run.yaml").recipe.training["optim"] == "sgd"


def test_a_finished_run_says_so(finished, tmp_path):
    run = _copy(finished, tmp_path / "run")
    file = run.folder / "run.yaml"
    file.write_text(runs.dump(run))

    def changed(**training):
        recipe = run.recipe.model_copy(update={"training": run.recipe.training | training})
        return run.model_copy(update={"recipe": recipe})

    assert f"is finished after step {STEPS}: {run.result_folder}; to train longer" in nothing_left(run)
    with pytest.raises(UsageError, match=r"raise training\.max_steps; other changes would have no effect"):
        nothing_left(changed(learning_rate=1.0))
    with pytest.raises(UsageError, match="other changes would have no effect"):
        nothing_left(changed(max_steps=STEPS - 1))
    assert nothing_left(changed(max_steps=STEPS + 1)) is None
    assert file.read_text() == runs.dump(run)
    shutil.rmtree(run.result_folder)  # killed while it was written
    assert nothing_left(run) is None


def test_an_optimizer_without_state_is_resumed(tiny_base, make_run, tmp_path):
    training = TRAINING | {"max_steps": 2, "optim": "sgd"}
    run = make_run(tiny_base, tmp_path / "run", "lora", training=training)
    run_ranks(train_here, 1, run)
    shutil.rmtree(run.folder / "checkpoints/checkpoint-2")
    shutil.rmtree(run.result_folder)
    run_ranks(train_here, 1, run.model_copy(update={"resume": True}))
    assert (run.result_folder / "adapter_config.json").is_file()


def test_a_run_ended_before_its_first_checkpoint_begins_again(tiny_base, make_run, tmp_path):
    run = make_run(tiny_base, tmp_path / "run", "lora", training=TRAINING | {"max_steps": 1})
    run_ranks(train_here, 1, run.model_copy(update={"resume": True}))
    assert (run.result_folder / "adapter_config.json").is_file()


def test_a_damaged_checkpoint_is_not_merged(finished, tmp_path):
    from click.testing import CliRunner

    from fitune.cli import cli

    run = _copy(finished, tmp_path / "run")
    (run.folder / "run.yaml").write_text(runs.dump(finished))
    checkpoint = run.folder / f"checkpoints/checkpoint-{STEPS}"
    with (checkpoint / "adapter/adapter_model.safetensors").open("r+b") as stream:
        stream.seek(-3, os.SEEK_END)
        stream.write(b"x")
    outcome = CliRunner().invoke(cli, ["merge", str(checkpoint), "--output", str(tmp_path / "out")])
    assert outcome.exit_code == 2 and "adapter_model.safetensors has other contents" in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_changed_data_is_refused(finished, prepared, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    shutil.copytree(prepared, tmp_path / "data")
    with (tmp_path / "data/train.jsonl").open("a") as stream:
        stream.write((prepared / "test.jsonl").read_text().splitlines()[0] + "\n")
    data = finished.recipe.data.model_copy(update={"prepared": str(tmp_path / "data")})
    recipe = finished.recipe.model_copy(update={"data": data})
    run = finished.model_copy(update={"recipe": recipe, "output_dir": str(tmp_path / "run"), "resume": True})
    assert "trained with data " in run_ranks(_output_of_resume, 1, run)[0]


@pytest.mark.parametrize("key", [key for key in Identity.model_fields])
def test_another_identity_is_refused_with_old_and_new(key, finished):
    checkpoint = finished.folder / f"checkpoints/checkpoint-{STEPS}"
    identity = read_manifest(checkpoint).identity
    refuse_another_identity(checkpoint, identity)
    new = {"seed": 77, "base_fingerprint": identity.base_fingerprint | {"sample": "f" * 64}}.get(key, "f" * 64)
    with pytest.raises(UsageError) as caught:
        refuse_another_identity(checkpoint, identity.model_copy(update={key: new}))
    old = getattr(identity, key)
    for value in (old, new):
        shown = str(list(value.values())[-1] if isinstance(value, dict) else value)
        assert (shown[:12] if len(shown) == 64 else shown) in str(caught.value)
    assert f"trained with {key} " in str(caught.value)


def test_the_samplers_state_is_not_a_pickle(finished):
    checkpoint = finished.folder / f"checkpoints/checkpoint-{STEPS}"
    assert torch.load(checkpoint / "scheduler.pt", weights_only=True)["last_epoch"] == STEPS
