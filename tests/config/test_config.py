"""Recipes, memory profiles and accelerate configs: mistakes are named in one line, and every file shipped is right."""

from pathlib import Path

import pytest
import yaml

from fitune.config import run as runs
from fitune.config.accelerate_config import read_accelerate_config
from fitune.config.installed_names import sft_config_fields
from fitune.config.optimizers import ARGUMENTS, all_optimizers, nearest_fit
from fitune.config.run import load_profile, load_recipe, resolve
from fitune.config.schema import AUTO, Method, Run
from fitune.config.shipped import ACCELERATE_CONFIGS, PROFILES, RECIPES, names
from fitune.config.training_fields import CHOICES, LIMITS, NEEDS_WORKERS, OWNED_ELSEWHERE, REFUSED
from fitune.errors import CRASHED, FituneError, UsageError
from fitune.planning import fill
from fitune.training.train import run_stage

RECIPE = """\
description: A recipe.
base:
  model: some/model
data:
  dataset: some/rows
  prepared: data/rows
method: qlora
lora:
  r: 8
  target_modules: [q_proj, v_proj]
max_length: 512
global_batch_size: 8
training:
  learning_rate: 2e-4
  num_train_epochs: 1
"""
PROFILE = """\
description: A profile.
accelerate_config: ACCELERATE
num_gpus: 2
gpu_memory_gib: 24
host_memory_gib: 64
fits:
  8b: [qlora, lora]
micro_batch: 2
kept_layers: 0
"""
ACCELERATE = """\
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_offload_params: true
mixed_precision: bf16
num_processes: 2
"""


@pytest.fixture
def write(tmp_path):
    """Writes the three files, `old` replaced by `new` in one of them; returns their paths."""

    def write_files(kind: str = "recipe", old: str = "", new: str = "") -> dict[str, Path]:
        paths = {name: tmp_path / f"{name}_8b.yaml" for name in ("recipe", "profile", "accelerate")}
        texts = {"recipe": RECIPE, "profile": PROFILE, "accelerate": ACCELERATE}
        assert old in texts[kind], old
        texts[kind] = texts[kind].replace(old, new, 1)
        for name, path in paths.items():
            path.write_text(texts[name].replace("ACCELERATE", str(paths["accelerate"])), encoding="utf-8")
        return paths

    return write_files


def _message(paths: dict[str, Path], sets: tuple[str, ...] = ()) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(str(paths["recipe"]), str(paths["profile"]), sets)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert "Traceback" not in message and "pydantic" not in message
    return message


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
    message = _message(paths)
    assert str(paths[kind]) in message
    for part in said:
        assert part in message


@pytest.mark.parametrize("field", OWNED_ELSEWHERE)
def test_training_field_owned_elsewhere_says_where(field, write):
    paths = write("recipe", "num_train_epochs: 1", f"{field}: 1")
    message = _message(paths)
    assert f"training.{field} is not set here: {OWNED_ELSEWHERE[field]}" in message
    assert str(paths["recipe"]) in message
    assert field in sft_config_fields(), "TRL has no such field any more"


PAIRS = {
    "lora block with full": (("method=full",), ["'full'", "lora:", "method: lora"]),
    "lora without its block": (("lora=null",), ["'qlora'", "lora:"]),
    "method not in the profile": (("method=full", "lora=null"), ["profile_8b", "lora, qlora", "recipe_8b", "full"]),
    "more rows a pass than there are": (
        ("global_batch_size=3", "profile.micro_batch=3"),
        ["micro_batch 3", "micro_batch=2"],
    ),
    "GPUs and processes differ": (("profile.num_gpus=4",), ["num_gpus 4", "num_processes 2", "make them equal"]),
    "GPUs on the CPU": (("profile.num_gpus=0",), ["num_gpus 0", "use_cpu: false"]),
    "unknown accelerate config": (("profile.accelerate_config=fsdp_2x40bg",), ["'fsdp_2x40bg'", "accelerate config"]),
    "set without a value": (("seed",), ["--set seed", "key=value"]),
    "set without a key": (("=3",), ["--set =3", "key=value"]),
    "set a part of a value": (("seed=1", "seed.x=2"), ["--set seed.x=2", "'seed' already has a value"]),
    "set broken YAML": (("seed=[1",), ["--set seed=[1", "not valid YAML"]),
    "set an unknown key": (("sede=1",), ["with --set", "'sede'", "did you mean 'seed'?"]),
    "set an unknown field": (("training.max_step=1",), ["with --set", "did you mean 'training.max_steps'?"]),
    "set the profile to a value": (("profile=3",), ["profile"]),
    "set an unknown value": (("training.optim=adamw_torh",), ["training.optim", "did you mean 'adamw_torch'?"]),
    "set an unknown strategy": (("training.save_strategy=never",), ["allowed: best, epoch, no, steps"]),
    "set a negative number of steps": (("training.max_steps=-5",), ["training.max_steps: -5 is not a number of steps"]),
    "evaluate with an unknown metric": (
        ("training.metric_for_best_model=bleu",),
        ["'bleu'; allowed: loss, perplexity,"],
    ),
    "load the best of nothing": (
        ("training.load_best_model_at_end=true",),
        ["training.load_best_model_at_end needs evaluations", "training.eval_strategy"],
    ),
    "save the best of nothing": (("training.save_strategy=best",), ["training.save_strategy=best needs evaluations"]),
    "stop early without looking": (("early_stopping.patience=2",), ["early_stopping needs evaluations"]),
    "follow a metric that is not measured": (
        ("training.lr_scheduler_type=reduce_lr_on_plateau",),
        ["training.lr_scheduler_type=reduce_lr_on_plateau needs evaluations"],
    ),
    "a metric that nobody asks for": (
        ("training.eval_strategy=epoch", "training.metric_for_best_model=perplexity"),
        ["training.metric_for_best_model would change nothing"],
    ),
    "load the best and save none": (
        ("training.eval_strategy=epoch", "training.load_best_model_at_end=true", "training.save_strategy='no'"),
        ["training.save_strategy=no saves none"],
    ),
    "evaluate after the end": (
        ("training.eval_strategy=steps", "training.eval_steps=9", "training.max_steps=5"),
        ["training.eval_steps 9 is beyond training.max_steps 5"],
    ),
    "a field without its block": (("learning_rate=1e-4",), ["'learning_rate'; did you mean 'training.learning_rate'?"]),
    "another program's word": (("epochs=3",), ["did you mean 'training.num_train_epochs'?"]),
    "that word in the right block": (("training.epochs=3",), ["did you mean 'training.num_train_epochs'?"]),
    "a list without brackets": (
        ("lora.target_modules=q_proj,v_proj",),
        ["lora.target_modules: a list needs brackets: [q_proj, v_proj]"],
    ),
    "trackers without brackets": (("training.report_to=tensorboard,wandb",), ["brackets: [tensorboard, wandb]"]),
    "an absent tracker": (("training.report_to=neptune",), ["needs the package neptune", "pip install neptune"]),
    "an unknown tracker": (("training.report_to=tensorbord",), ["did you mean 'tensorboard'?"]),
    "a name for no tracker": (("training.run_name=x",), ["training.run_name is for training.report_to="]),
    "Adam's with another optimizer": (("training.optim=sgd", "training.adam_beta1=0.8"), ["would ignore it"]),
    "an argument that is none": (
        ("training.optim=sgd", "training.optim_args=momentm=0.9"),
        ["sgd has no argument 'momentm'; did you mean 'momentum'?"],
    ),
    "a schedule without its argument": (
        ("training.lr_scheduler_type=cosine_with_min_lr",),
        ["needs min_lr or min_lr_rate", "training.lr_scheduler_kwargs.min_lr=1e-6"],
    ),
    "an argument of another schedule": (
        ("training.lr_scheduler_kwargs.min_lr=1e-6",),
        ["schedule linear has no argument 'min_lr'"],
    ),
    "no epoch": (("training.num_train_epochs=0",), ["training.num_train_epochs: 0.0 is not above 0"]),
    "a seed that numpy refuses": (("seed=4294967296",), ["seed: Input should be less than 4294967296"]),
    "a step and a half": (("training.save_steps=1.5",), ["training.save_steps: 1.5 is not a whole number of steps"]),
    "a rate below 0": (("training.learning_rate=-1e-4",), ["training.learning_rate: -0.0001 is not above 0"]),
    "a loss that is none": (("training.loss_type=dtf",), ["did you mean 'dft'?", "training.loss_type"]),
    "set the training block": (("training=3",), ["training"]),
    "set a key of a list": (("lora.target_modules.x=3",), ["lora.target_modules"]),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_impossible_pair_is_named_in_one_line(pair, write):
    sets, said = PAIRS[pair]
    message = _message(write(), sets)
    for part in said:
        assert part in message


def test_every_missing_key_is_named(write):
    message = _message(write("recipe", RECIPE, "description: A recipe.\nmethod: qlora\n"))
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


@pytest.mark.parametrize("name", sorted(all_optimizers()))
def test_every_optimizer_resolves_or_names_the_nearest_that_works(name, write):
    sets = (f"training.optim={name}",)
    if name in ARGUMENTS:
        paths = write()
        assert resolve(str(paths["recipe"]), str(paths["profile"]), sets).recipe.training["optim"] == name
        return
    message = _message(write(), sets)
    assert f"training.optim={name} " in message and nearest_fit(name) in ARGUMENTS
    assert message.endswith(f"the nearest that works: {nearest_fit(name)}")


@pytest.mark.parametrize("field", REFUSED)
def test_a_refused_training_field_says_why(field, write):
    message = _message(write("recipe", "num_train_epochs: 1", f"{field}: 1"))
    assert f"training.{field} cannot be set: {REFUSED[field]}" in message


def test_tables_name_fields_that_exist():
    for table in (OWNED_ELSEWHERE, REFUSED, LIMITS, CHOICES, NEEDS_WORKERS):
        assert set(table) <= set(sft_config_fields())
    assert not set(OWNED_ELSEWHERE) & set(REFUSED)


def test_wrong_names_and_paths_are_usage_errors(write, tmp_path):
    paths = write()
    for recipe, profile, said in (
        ("llama3_8b_qlor", "x", ["no recipe called 'llama3_8b_qlor'", "did you mean"]),
        (str(tmp_path / "none.yaml"), "x", ["none.yaml: no such file"]),
        (str(tmp_path), "x", [str(tmp_path), "is a folder without run.yaml"]),
        (str(paths["recipe"]), "fsdp_4x24bg", ["no memory profile called 'fsdp_4x24bg'", "did you mean"]),
    ):
        message = _message({"recipe": recipe, "profile": profile})
        assert all(part in message for part in said), message
    (tmp_path / "run.yaml").touch()
    a_run = _message({"recipe": str(tmp_path), "profile": "x"})
    assert a_run.endswith(f"recipe {tmp_path}: is a run's folder; name a recipe or its .yaml file")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert "binary.yaml" in _message({"recipe": binary, "profile": "x"})


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
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", names(RECIPES))
def test_shipped_recipe_is_valid_and_has_a_profile(name):
    recipe = load_recipe(name)
    assert recipe.description
    fitting = [p for p in names(PROFILES) if runs.goes_with(recipe, load_profile(p))]
    assert fitting, "no memory profile goes with it"
    for profile in fitting:
        run = fill.resolve(name, profile)
        assert Run.model_validate(yaml.safe_load(runs.dump(run))) == run


@pytest.mark.parametrize("name", names(PROFILES))
def test_shipped_profile_is_valid_and_names_an_accelerate_config(name):
    profile = load_profile(name)
    accelerate = read_accelerate_config(ACCELERATE_CONFIGS / f"{profile.accelerate_config}.yaml")
    assert profile.accelerate_config == name
    assert accelerate.num_processes == profile.num_gpus or (accelerate.use_cpu and not profile.num_gpus)
    assert set(profile.expected) <= set(names(RECIPES))


@pytest.mark.parametrize("name", names(ACCELERATE_CONFIGS))
def test_shipped_accelerate_config_is_valid_and_used(name):
    assert read_accelerate_config(ACCELERATE_CONFIGS / f"{name}.yaml").num_processes >= 1
    assert name in {load_profile(profile).accelerate_config for profile in names(PROFILES)}


def test_every_method_is_shipped():
    shipped = {load_recipe(name).method for name in names(RECIPES)}
    assert shipped == set(Method.__args__)
