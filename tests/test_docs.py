"""What README.md and the docs name exists: commands, keys, paths, links, functions, tests, figures."""

import ast
import contextlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from click import Context
from click.exceptions import Exit

from benchmarks.peer_tables import newest_peers
from fitune.cli import cli
from fitune.config import run as runs
from fitune.config.installed_names import sft_config_fields
from fitune.config.shipped import PROFILES, RECIPES, names
from tests.pages import PAGES, ROOT, code, commands, headings, keys_in, links, quoted, settings, text

MADE_LATER = ("runs/", "models/", "data/", "rows.jsonl", "adapter/", "model/", "checkpoints/", "tensorboard/")
"Paths that a command writes, or that stand for the reader's own."
OF_OTHERS = {
    "--nproc-per-node", "--config_file", "--check", "--secret", "--cpus-per-task", "--mem", "--requeue", "--signal",
    "--shm-size", "--wait",
}  # fmt: skip
"Options of torchrun, accelerate, scripts in docs/ and benchmarks/, SkyPilot, Slurm and Docker."
COMMANDS = commands(set(cli.commands))


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.is_whole], ids=str)
def test_every_command_can_be_typed(command):
    name, *rest = command.words
    assert name in cli.commands
    with contextlib.suppress(Exit):
        params = cli.commands[name].make_context(name, rest, parent=Context(cli)).params
        resolve_what_it_names(params)


def resolve_what_it_names(params: dict) -> None:
    """Raises UsageError for a recipe, profile or key that does not exist. Words in capitals stand for the user's."""
    recipe, profile, sets = params.get("recipe"), params.get("profile"), params.get("sets") or ()
    if not recipe or recipe.isupper() or recipe.startswith(("runs/", "models/")) or recipe.endswith(".yaml"):
        return
    if profile and not profile.isupper():
        runs.resolve(recipe, profile, sets)
    else:
        runs.load_recipe(recipe, runs.parse_sets(sets)[0])


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.is_whole], ids=str)
def test_every_mentioned_command_has_the_options_named(command):
    name, *rest = command.words
    assert name in cli.commands
    has = {option for parameter in cli.commands[name].params for option in parameter.opts + parameter.secondary_opts}
    assert {word for word in rest if word.startswith("--")} <= has | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_is_one_of_some_command(page):
    of_fitune = {
        option
        for command in [cli, *cli.commands.values()]
        for parameter in command.params
        for option in parameter.opts + parameter.secondary_opts
    }
    of_this = [words for words in quoted(page) if words.startswith("-") or words.split()[0] in cli.commands]
    named = {option for words in of_this for option in re.findall(r"(?<!\S)--[a-z][\w-]+", words)}
    assert named <= of_fitune | OF_OTHERS | {"--help"}


@pytest.mark.parametrize(("page", "setting"), settings())
def test_every_key_after_set_is_taken(page, setting):
    recipe, profile = runs.parse_sets(("training.eval_strategy=steps", setting))  # some keys are about evaluations
    runs.load_recipe("llama3_8b_qlora", recipe)
    runs.load_profile("single_gpu", profile)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_is_named_exists(page):
    known = set(re.findall(r"^\| `([\w.]+)", text(ROOT / "docs" / "keys.md"), flags=re.M))
    known |= {f"training.{name}" for name in sft_config_fields()}
    for words in quoted(page):
        key = re.match(r"(profile\.)?((?:base|data|lora|early_stopping|training)\.\w+|\w+)(?=[=: ]|$)", words)
        if key and (key[1] or "." in key[2]):
            assert key[2] in known, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_and_profile_that_is_named_exists(page):
    shipped = {*names(RECIPES), *names(PROFILES)}
    for words in quoted(page):
        if re.fullmatch(r"llama3(\.\d)?_\d+b_\w+|fsdp_(offload_)?\d\w+|single_gpu\w*|cpu_\d\w+|tiny_\w+", words):
            assert words in shipped, words


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z0-9-]+):", text(ROOT / "Makefile"), flags=re.M))
    lines = [line for page in PAGES for line in [*code(page), *quoted(page)]]
    named = {word for line in lines for word in re.findall(r"^make ([a-z][a-z0-9-]*)", line)}
    assert named and named <= targets


def test_every_train_target_resolves():
    lines = re.findall(r"cli\.py train (\S+) --profile (\S+)", text(ROOT / "Makefile"))
    assert len(lines) >= 8
    for recipe, profile in lines:
        runs.resolve(recipe, profile)


def test_the_tree_names_each_wing_once():
    trees = [block for page in PAGES for block in re.findall(r"```\n(.*?)```", text(page), flags=re.S)]
    tree = next(block for block in trees if re.match(r"cli\.py {4,}", block))
    named = [line.split()[0] for line in tree.splitlines()]
    for path in named:
        assert (ROOT / path).exists(), path
    wings = {f"fitune/{path.parent.name}/" for path in (ROOT / "fitune").glob("*/__init__.py")}
    assert sorted(name for name in named if name.startswith("fitune/")) == sorted(wings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_or_quoted_path_exists(page):
    for target in links(page):
        file, _, heading = target.partition("#")
        if "://" in target:
            assert target.startswith("https://"), target
            continue
        linked = page.parent / file if file else page
        assert linked.exists(), target
        assert not heading or heading in headings(linked), target
    for word in (re.sub(r"::.*", "", word) for word in quoted(page)):
        if re.fullmatch(r"[\w./*-]+/[\w./*-]*", word) and (ROOT / word.split("/")[0]).exists():
            assert word.startswith(MADE_LATER) or list(ROOT.glob(word.rstrip("/"))), word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_module_has_what_is_named_in_it(page):
    """`tests/x.py::name`, `fitune.wing.module`, and in a paragraph with `fitune/wing/x.py` a `name()`."""
    for words in quoted(page):
        if inside := re.fullmatch(r"([\w/]+\.py)::(\w+)", words):
            assert inside[2] in defined_in(ROOT / inside[1]), words
        if re.fullmatch(r"fitune(\.\w+)+", words):
            assert is_module_or_in_one(words), words
    for paragraph in re.split(r"\n(?:\n|(?=[|-] |\d+\. ))", text(page)):
        files = [ROOT / file for file in re.findall(r"\bfitune/[\w/]+\.py\b", paragraph)]
        if files:
            defined = {name for file in files for name in defined_in(file)}
            assert {*re.findall(r"`([A-Za-z_]\w*)\(\)`", paragraph)} <= defined, paragraph


@cache
def defined_in(file: Path) -> set[str]:
    """Functions, classes and their methods of a file, and its constants."""
    nodes = list(ast.walk(ast.parse(text(file))))
    found = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assigned = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    return found | {target.id for target in assigned if isinstance(target, ast.Name)}


def is_module_or_in_one(dotted: str) -> bool:
    path = ROOT / dotted.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module = path.parent.with_suffix(".py")
    return module.is_file() and path.name in defined_in(module)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_environment_variable_is_read(page):
    source = "".join(text(file) for file in (ROOT / "fitune").rglob("*.py"))
    for name in set(re.findall(r"\bFITUNE_[A-Z_]+\b", text(page))):
        assert name in source, name


def test_every_promise_has_its_test():
    promised = [words for page in PAGES for words in quoted(page) if re.fullmatch(r"tests/[\w/]+\.py::\w+", words)]
    assert len(promised) > 10
    for words in promised:
        file, _, test = words.partition("::")
        assert test in defined_in(ROOT / file), words


def test_tables_are_generated_from_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@cache
def texts_in_the_code() -> list[str]:
    """Every text in fitune/, with `…` where a value stands in it."""
    found = []
    for file in (ROOT / "fitune").rglob("*.py"):
        for node in ast.walk(ast.parse(text(file))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_of_troubleshooting_is_one_of_the_code():
    page = text(ROOT / "docs" / "troubleshooting.md")
    messages = re.findall(r"^\| `(.+?)` \|", page, flags=re.M)
    assert len(messages) > 30
    for message in messages:
        pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))
        assert any(re.search(pattern, said, flags=re.S) for said in texts_in_the_code()), message


def test_every_key_of_a_yaml_block_exists():
    known = set(re.findall(r"^\| `([\w.\[\]]+)` \|", text(ROOT / "docs" / "keys.md"), flags=re.M))
    blocks = [(page, block) for page in PAGES for block in re.findall(r"```yaml\n(.*?)```", text(page), flags=re.S)]
    assert blocks
    for page, block in blocks:
        for key in keys_in(yaml.safe_load(block)):
            assert key in known or key.startswith("data.columns."), f"{page.name}: {key}"


def test_the_figures_of_the_comparison_are_measured():
    measured = {
        (run["who"], f"{run['tokens_per_second']:,}", f"{run['peak_allocated_gib']:.1f}")
        for run in newest_peers()
        if "tokens_per_second" in run
    }
    rows = re.findall(
        r"^\| 8B QLoRA.*?\| (\w+)[\w ]* \| \d \| ([\d,]+) \| ([\d.]+) \|$",
        text(ROOT / "docs" / "comparison.md"),
        flags=re.M,
    )
    assert len(rows) >= 5
    assert {(who.lower(), speed, gib) for who, speed, gib in rows} <= measured


def test_the_readme_is_short():
    assert len(text(ROOT / "README.md").splitlines()) < 150
