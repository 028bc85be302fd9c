"""Recipes, memory profiles and accelerate configs become a run, and mistakes in them are named in one line."""

import pytest
import torch.distributed as dist
import yaml
from one_run import RECIPE, message_of

from fitune.config import run as runs
from fitune.config.run import load_recipe, resolve
from fitune.config.schema import AUTO
from fitune.errors import CRASHED, FituneError, UsageError
from fitune.training.train import run_stage


def test_files_resolve_to_a_run(write, tmp_path):
    paths = write()
    run = resolve(str(paths["recipe"]), str(paths["profile"]), output=str(tmp_path / "out"))
    assert run.gradient_accumulation_steps == 2
    assert run.recipe.training == {"learning_rate": 2e-4, "num_train_epochs": 1}  # YAML reads 2e-4 as text
    assert run.accelerate.offload_params and run.accelerate.mixed_precision == "bf16"
    assert run.accelerate.reshard_after_forward == AUTO and not run.accelerate.keeps_gathered, "until plan has chosen"
    assert run.result_folder == tmp_path / "out" / "adapter"

    sets = ("training.learning_rate=1e-5", "lora.r=4", "seed=7", "global_batch_size=16", "profile.micro_batch=4")
    sets += ("lora.dropout=5e-2",)  # which YAML 1.1 takes for text
    changed = resolve(str(paths["recipe"]), str(paths["profile"]), sets)
    assert changed.recipe.training == {"learning_rate": 1e-5, "num_train_epochs": 1}
    assert (changed.recipe.lora.r, changed.recipe.lora.target_modules) == (4, ["q_proj", "v_proj"])
    assert changed.recipe.lora.dropout == 0.05
    assert (changed.recipe.seed, changed.profile.micro_batch, changed.gradient_accumulation_steps) == (7, 4, 2)

    run.folder.mkdir()
    (run.folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    assert runs.load(run.folder) == runs.load(run.folder / "run.yaml") == run
    moved = run.folder.rename(tmp_path / "moved")
    assert runs.load(moved) == run.model_copy(update={"output_dir": str(moved)})


def test_any_number_of_ranks_takes_any_global_batch(write):
    """Passes per step; filler rows take the places left in the last one."""
    paths = write("accelerate", "num_processes: 2", "num_processes: 3")
    for batch, rows, passes in ((8, 1, 3), (8, 2, 2), (8, 3, 1), (9, 3, 1), (1, 1, 1), (2, 1, 1)):
        sets = (f"global_batch_size={batch}", f"profile.micro_batch={rows}", "profile.num_gpus=3")
        assert resolve(str(paths["recipe"]), str(paths["profile"]), sets).gradient_accumulation_steps == passes


def test_a_run_from_before_layers_were_kept_is_still_read(tmp_path):
    run = runs.resolve("tiny_qlora", "cpu_2proc", (), str(tmp_path))
    content = yaml.safe_load(runs.dump(run))
    content["profile"] |= {"activation_checkpointing": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert runs.load(tmp_path) == run


def test_steps_are_written_as_whole_numbers_and_read_either_way(tmp_path):
    sets = ("training.save_steps=50", "training.logging_steps=5.0", "training.warmup_steps=0.1")
    run = resolve("tiny_qlora", "cpu_2proc", sets, tmp_path)
    text = runs.dump(run)
    assert "save_steps: 50\n" in text and "logging_steps: 5\n" in text and "warmup_steps: 0.1\n" in text
    (tmp_path / "run.yaml").write_text(text.replace("save_steps: 50\n", "save_steps: 50.0\n"), encoding="utf-8")
    assert runs.load(tmp_path) == run


MISTAKES = {
    # what is wrong: file, text, its replacement, what the message must say beside the file
    "unknown key": ("recipe", "max_length", "max_lenght", ["'max_lenght'", "did you mean 'max_length'?"]),
    "unknown key in a block": ("recipe", "  r: 8", "  rank: 8\n  alpa: 3", ["'lora.rank'", "did you mean 'lora.r'?"]),
    "typo in a block": ("recipe", "  r: 8", "  alpa: 8", ["'lora.alpa'", "did you mean 'lora.alpha'?"]),
    "typo in data": ("recipe", "prepared:", "prepard:", ["'data.prepard'", "did you mean 'data.prepared'?"]),
    "typo in a list": (
        "recipe",
        "  prepared:",
        "  mix: [{dataset: a/b, wieght: 2}]\n  prepared:",
        ["'data.mix.0.wieght'", "did you mean 'data.mix.0.weight'?"],
    ),
    "unknown key in a profile": ("profile", "micro_batch", "micro_batches", ["did you mean 'micro_batch'?"]),
    "a profile's key of earlier versions": (
        "profile",
        "micro_batch: 2",
        "micro_batch: 2\nhybrid_sharding: true",
        ["'hybrid_sharding'; replicas took its place, the copies of the model: as many as machines for true"],
    ),
    "unknown key of accelerate": ("accelerate", "num_processes", "num_proceses", ["did you mean 'num_processes'?"]),
    "typo in fsdp_config": (
        "accelerate",
        "fsdp_offload_params",
        "fsdp_offload_parms",
        ["fsdp_config.fsdp_offload_parms", "did you mean 'fsdp_config.fsdp_offload_params'?"],
    ),
    "missing key": ("recipe", "  model: some/model", "  revision: main", ["'base.model'", "missing"]),
    "missing process number": ("accelerate", "num_processes: 2\n", "", ["'num_processes'", "missing"]),
    "text for a number": ("recipe", "max_length: 512", "max_length: many", ["max_length", "integer", "'many'"]),
    "fraction for a whole number": ("recipe", "  r: 8", "  r: 8.5", ["lora.r", "integer", "8.5"]),
    "yes for a number": ("recipe", "max_length: 512", "max_length: yes", ["max_length", "not 'yes'"]),
    "number for text": ("recipe", "some/model", "7", ["base.model", "string", "7"]),
    "zero": ("recipe", "global_batch_size: 8", "global_batch_size: 0", ["global_batch_size", "greater than 0"]),
    "dropout of one": ("recipe", "  r: 8", "  dropout: 1.0", ["lora.dropout", "less than 1"]),
    "block given as text": (
        "recipe",
        "base:\n  model: some/model",
        "base: some/model",
        ["base is a block of keys", "base.model"],
    ),
    "null block": ("recipe", "base:\n  model: some/model", "base:", ["base"]),
    "unknown method": ("recipe", "method: qlora", "method: qlorra", ["method", "'qlora'", "'qlorra'"]),
    "no GPU memory": ("profile", "gpu_memory_gib: 24\n", "", ["gpu_memory_gib is missing"]),
    "unknown method in a profile": ("profile", "[qlora, lora]", "[dora]", ["fits.8b.0", "'dora'"]),
    "micro batch as text": ("profile", "micro_batch: 2", "micro_batch: two", ["yaml: micro_batch: ", "not 'two'"]),
    "micro batch of none": ("profile", "ch: 2", "ch: 0", ["yaml: micro_batch: ", "greater than 0"]),
    "a size that is none": ("profile", "8b: [", "huge: [", ["'huge' is no size of a model: write 8b, 70b or 135m"]),
    "text and none, counted once each": (
        "profile",
        "host_memory_gib: 64",
        "host_memory_gib: much\nembedding_offload: perhaps\nactivation_offload: x",
        ["host_memory_gib: ", "'much'", "(and 2 more)"],
    ),
    "one mistake is one": ("profile", "ch: 2", "ch: two\nembedding_offload: x", ["micro_batch: ", "(and 1 more)"]),
    "null as a key": ("recipe", "max_length: 512", "max_length: 512\nnull: 3", ["None: "]),
    "null as a key of a block": ("recipe", "training:\n", "training:\n  null: 3\n", ["training.None: "]),
    "quoted true": ("accelerate", "offload_params: true", "offload_params: 'true'", ["offload_params", "bool"]),
    "fp16": ("accelerate", "mixed_precision: bf16", "mixed_precision: fp16", ["mixed_precision", "'bf16'", "'fp16'"]),
    "float32 on GPUs": ("accelerate", "mixed_precision: bf16\n", "", ["mixed_precision must be bf16 on GPUs"]),
    "processes as text": ("accelerate", "num_processes: 2", "num_processes: two", ["num_processes", "'two'"]),
    "not FSDP": ("accelerate", "type: FSDP", "type: MULTI_GPU", ["distributed_type", "FSDP", "MULTI_GPU"]),
    "FSDP version 1": ("accelerate", "fsdp_version: 2", "fsdp_version: 1", ["fsdp_config.fsdp_version must be 2"]),
    "fsdp_config as text": (
        "accelerate",
        "fsdp_config:\n  fsdp_version: 2\n  fsdp_offload_params: true",
        "fsdp_config: fast",
        ["fsdp_config"],
    ),
    "fsdp_config without effect": (
        "accelerate",
        "fsdp_offload_params: true",
        "fsdp_activation_checkpointing: true",
        ["fsdp_config.fsdp_activation_checkpointing", "kept_layers in the memory profile"],
    ),
    "other state dict": (
        "accelerate",
        "fsdp_offload_params: true",
        "fsdp_state_dict_type: FULL_STATE_DICT",
        ["fsdp_config.fsdp_state_dict_type", "SHARDED_STATE_DICT"],
    ),
    "key given twice": ("recipe", "max_length: 512", "max_length: 512\nmax_length: 256", ["'max_length' is given"]),
    "key twice in a block": ("recipe", "  r: 8", "  r: 8\n  r: 16", ["'r' is given twice", ":10"]),
    "broken YAML": ("recipe", "method: qlora", "method: [qlora", ["not valid YAML"]),
    "a tab": ("recipe", "  r: 8", "\tr: 8", ["not valid YAML", ":9"]),
    "a list key": ("recipe", "method: qlora", "[method]: qlora", ["not valid YAML"]),
    "a mapping as key": ("recipe", "method: qlora", "{a: b}: qlora", ["not valid YAML"]),
    "a number as key": ("recipe", "method: qlora", "method: qlora\n7: seven", ["7: "]),
    "a number as fsdp key": ("accelerate", "fsdp_version: 2", "fsdp_version: 2\n  7: seven", ["7"]),
    "a tag": ("recipe", "some/model", "!!python/object/apply:os.getcwd []", ["not valid YAML"]),
    "a list": ("recipe", RECIPE, "- a\n- b\n", ["expected 'key: value' lines", "list"]),
    "an empty file": ("recipe", RECIPE, "", ["expected 'key: value' lines"]),
    "unknown training field": (
        "recipe",
        "learning_rate",
        "learning_rat",
        ["training.learning_rat ", "did you mean 'training.learning_rate'?"],
    ),
    "training field of a wrong type": (
        "recipe",
        "learning_rate: 2e-4",
        "learning_rate: fast",
        ["training.learning_rate", "'fast'", "is not a number"],
    ),
    "training as a list": ("recipe", "  learning_rate: 2e-4\n  num_train_epochs: 1", "  - learning_rate", ["training"]),
    "a number in training": ("recipe", "num_train_epochs", "1", ["training", "1"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named_in_one_line(mistake, write):
    kind, old, new, said = MISTAKES[mistake]
    paths = write(kind, old, new)
    message = message_of(paths)
    assert str(paths[kind]) in message
    for part in said:
        assert part in message


def test_every_missing_key_is_named(write):
    message = message_of(write("recipe", RECIPE, "description: A recipe.\nmethod: qlora\n"))
    for key in ("base", "data", "max_length", "global_batch_size"):
        assert f"'{key}'" in message
    assert message.endswith(" are missing")


def test_words_that_yaml_reads_as_true_or_false(write):
    paths = write("recipe", "training:\n", "packing: no\ntraining:\n  save_strategy: no\n  report_to: none\n")
    recipe = load_recipe(str(paths["recipe"]))
    assert recipe.packing is False and recipe.training["save_strategy"] == "no"
    sets = ("training.eval_strategy=no", "training.disable_tqdm=on", "packing=yes", "training.logging_first_step=off")
    run = resolve(str(paths["recipe"]), str(paths["profile"]), sets)
    assert run.recipe.packing is True
    assert run.recipe.training["eval_strategy"] == "no"
    assert run.recipe.training["disable_tqdm"] is True and run.recipe.training["logging_first_step"] is False


def test_wrong_names_and_paths_are_usage_errors(write, tmp_path):
    paths = write()
    for recipe, profile, said in (
        ("llama3_8b_qlor", "x", ["no recipe called 'llama3_8b_qlor'", "did you mean"]),
        (str(tmp_path / "none.yaml"), "x", ["none.yaml: no such file"]),
        (str(tmp_path), "x", [str(tmp_path), "is a folder without run.yaml"]),
        (str(paths["recipe"]), "fsdp_4x24bg", ["no memory profile called 'fsdp_4x24bg'", "did you mean"]),
    ):
        message = message_of({"recipe": recipe, "profile": profile})
        assert all(part in message for part in said), message
    (tmp_path / "run.yaml").touch()
    a_run = message_of({"recipe": str(tmp_path), "profile": "x"})
    assert a_run.endswith(f"recipe {tmp_path}: is a run's folder; name a recipe or its .yaml file")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert "binary.yaml" in message_of({"recipe": binary, "profile": "x"})


def test_stage_prints_one_line_and_exits_with_the_errors_code(write, tmp_path, capsys):
    run = resolve(str(write()["recipe"]), str(tmp_path / "profile_8b.yaml"))
    good = yaml.safe_load(runs.dump(run))
    contents = {
        "unknown": yaml.safe_dump(good | {"sede": 3}),
        "wrong": yaml.safe_dump(good | {"gradient_accumulation_steps": "two"}),
        "broken": "recipe: [",
        "missing": None,
    }
    for name, text in contents.items():
        path = tmp_path / f"{name}.yaml"
        if text is not None:
            path.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit) as caught:
            run_stage(path, lambda run: pytest.fail("the stage was started"))
        assert caught.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and str(path) in line


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("wrong"), 2, "error: wrong"),
        (FituneError("it cannot go on"), 1, "error: it cannot go on"),
        (ZeroDivisionError("a mistake of ours"), CRASHED, "ZeroDivisionError: a mistake of ours"),
        (RuntimeError("[gloo/transport/tcp] Connection closed by peer"), CRASHED, "rank 0: another rank is gone"),
        (dist.DistNetworkError("Failed to recv, got 0 bytes."), CRASHED, "rank 0: machine 0 is gone, or"),
    ],
)
def test_what_a_stage_raises_decides_its_exit_code(error, code, said, write, tmp_path, capsys):
    """The launcher starts a run again after what nobody expected, and only then."""

    def stage(run):
        raise error

    path = tmp_path / "run.yaml"
    path.write_text(runs.dump(resolve(str(write()["recipe"]), str(tmp_path / "profile_8b.yaml"))), encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        run_stage(path, stage)
    assert caught.value.code == code
    printed = capsys.readouterr().err
    assert said in printed and ("Traceback" in printed) == isinstance(error, ZeroDivisionError)
