"""Who may import whom: the wings of fitune/, and what the quick commands must not load."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "config": set(),
    "data": {"config"},
    "planning": {"config"},
    "report": {"config", "planning"},
    "model": {"config"},
    "weights": {"model", "config"},
    "optimizers": {"model", "config"},
    "export": {"config", "data", "model", "weights"},
    "launching": {"planning", "config"},
    "training": {"config", "data", "planning", "model", "optimizers", "weights", "export", "launching", "report"},
    "demo": {
        "config",
        "data",
        "planning",
        "model",
        "optimizers",
        "weights",
        "export",
        "launching",
        "training",
        "report",
    },
}
"Each wing may also import itself and the leaves."
LEAVES = {"columns", "environment", "errors", "output_folder", "progress"}
"Modules that any wing may import; they import one another at most."
ENTRANCES = {"cli", "cli_completion", "cli_group", "cli_options", "cli_results"}
"The command line: modules that may import everything and that no wing may import."
WITHOUT_TORCH = {"config", "planning", "report"}
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "matplotlib")
TOP = "the package itself, for its version"
FILES = sorted((ROOT / "fitune").rglob("*.py"))


def owner(path: Path) -> str:
    """The wing of a file, or the name of a module that stands in none."""
    first = path.relative_to(ROOT / "fitune").parts[0]
    return first.removesuffix(".py")


@cache
def imported_modules(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, inside functions too, with the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute here"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def imported_owners(path: Path) -> list[tuple[str, int]]:
    """Which wings, leaves and entrances of fitune a file imports."""
    modules = [(name.split("."), line) for name, line in imported_modules(path)]
    return [(TOP if parts[1] == "__version__" else parts[1], line) for parts, line in modules if parts[0] == "fitune"]


def allowed(name: str) -> set[str]:
    if name in LEAVES:
        return LEAVES
    if name in MAY_IMPORT:
        return MAY_IMPORT[name] | {name, TOP} | LEAVES
    return {*MAY_IMPORT, *LEAVES, *ENTRANCES, TOP}  # entrances, and __init__ and __main__ of the package


def test_every_folder_and_module_is_in_the_table():
    assert {owner(path) for path in FILES} == {*MAY_IMPORT, *LEAVES, *ENTRANCES, "__init__", "__main__"}


@pytest.mark.parametrize("name", sorted({owner(path) for path in FILES}))
def test_a_wing_imports_only_what_the_table_allows(name):
    for path in FILES:
        if owner(path) == name:
            for other, line in imported_owners(path):
                assert other in allowed(name), f"{path.relative_to(ROOT)}:{line}: {name} may not import {other}"


def test_no_two_modules_import_each_other():
    """Inside a wing as well: a circle hides in a function that imports late."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        names = {name for name, _ in imported_modules(path)}
        graph[module] = (names | {name.rpartition(".")[0] for name in names}) & modules.keys()
    for module in modules:
        seen, waiting = set(), list(graph[module])
        while waiting:
            current = waiting.pop()
            assert current != module, f"{module} imports itself through {sorted(seen)}"
            if current not in seen:
                seen.add(current)
                waiting += graph[current]


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH | LEAVES))
def test_what_answers_at_once_never_names_torch(name):
    for path in FILES:
        if owner(path) == name:
            for module, line in imported_modules(path):
                assert module.split(".")[0] != "torch", f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["list"],
        ["show", "tiny_qlora", "--profile", "cpu_2proc"],
        ["plan", "llama3_70b_qlora", "--profile", "fsdp_4x24gb"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_quick_commands_import_nothing_heavy(arguments):
    code = "import sys, runpy; sys.argv[0] = 'cli.py'\n"
    code += "try: runpy.run_path('cli.py', run_name='__main__')\nexcept SystemExit: pass\n"
    code += f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("HEAVY []\n")


def test_no_two_test_files_share_a_name():
    """pytest imports them by their bare names, so the second would not be read."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
