"""The list of planted faults does not rot, and what plants them says which one lives."""

import subprocess
import sys

import pytest
from copies import files_of_the_tree
from fault_list import ROOT, WINGS, Fault, all_faults, missing_tests, planted, read_faults
from plant import failing_without_a_fault, files_of_tests, outcomes_of, plant, table

FAULTS = all_faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.wing}: {fault.name}")
def test_a_fault_can_be_planted_and_its_tests_are_there(fault):
    planted(fault)
    assert fault.tests
    assert not missing_tests(fault)


def test_every_wing_has_its_faults():
    for wing in WINGS:
        assert read_faults(wing), wing
    for fault in FAULTS:
        folder = fault.file.split("/")[1]
        assert fault.wing == (folder if folder in WINGS else "cli"), f"{fault.name}: of {fault.wing}?"
    assert len({(fault.file, fault.text, fault.becomes) for fault in FAULTS}) == len(FAULTS)


@pytest.fixture
def tree(tmp_path):
    """A package with a function, and two tests: one that holds what it returns, one that does not look."""
    (tmp_path / "fitune").mkdir()
    (tmp_path / "fitune/__init__.py").touch()
    (tmp_path / "fitune/one.py").write_text("def one():\n    return 1\n")
    (tmp_path / "test_one.py").write_text(
        "from fitune.one import one\n\n\ndef test_value():\n    assert one() == 1\n\n\ndef test_nothing():\n    one()\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("text", "becomes", "tests", "problem"),
    [
        ("return 1", "return 2", ["test_one.py::test_value"], None),
        ("return 1", "return 2", ["test_one.py::test_nothing"], "LIVES: its tests pass"),
        ("return 1", "return 2", ["test_one.py"], None),
        ("return 3", "return 2", ["test_one.py"], "cannot be planted: fitune/one.py: the text stands there 0 times"),
        ("n", "m", ["test_one.py"], "cannot be planted: fitune/one.py: the text stands there 2 times"),
        ("return 1", "return 1", ["test_one.py"], "cannot be planted: fitune/one.py: nothing is changed"),
        ("return 1", "return (", ["test_one.py"], "cannot be planted: '(' was never closed"),
        ("return 1", "return 2", ["test_one.py::test_gone"], "no such test: test_one.py::test_gone"),
        ("def one", "def two", ["test_one.py"], "its tests could not be run (pytest's exit code 2)"),
    ],
)
def test_a_fault_is_noticed_or_its_problem_named(text, becomes, tests, problem, tree):
    files = [path.relative_to(tree) for path in tree.rglob("*.py")]
    before = {path: (tree / path).read_bytes() for path in files}
    outcome = plant(Fault("cli", "a fault", "fitune/one.py", text, becomes, tuple(tests)), files, tree)
    assert outcome.problem is None if problem is None else outcome.problem.startswith(problem), outcome
    assert outcome.record()["noticed"] == (problem is None)
    assert {path: (tree / path).read_bytes() for path in files} == before, "only the copy is changed"
    assert sorted(path.relative_to(tree) for path in tree.rglob("*") if path.is_file()) == sorted(files)


def test_tests_that_take_too_long_are_no_verdict(tree):
    (tree / "test_one.py").write_text("import time\n\n\ndef test_value():\n    time.sleep(60)\n")
    files = [path.relative_to(tree) for path in tree.rglob("*.py")]
    fault = Fault("cli", "a fault", "fitune/one.py", "return 1", "return 2", ("test_one.py",))
    assert plant(fault, files, tree, timeout=1).problem == "no verdict after 1 s"


def test_a_test_that_fails_without_a_fault_proves_nothing(tree):
    """The fault of a test that passes is planted all the same."""
    tests = (tree / "test_one.py").read_text() + "\n\ndef test_always():\n    assert one() == 3\n"
    (tree / "test_one.py").write_text(tests)
    files = [path.relative_to(tree) for path in tree.rglob("*.py")]
    faults = [
        Fault("cli", name, "fitune/one.py", "return 1", "return 2", (f"test_one.py::{test}",))
        for name, test in (("seen", "test_value"), ("lives", "test_nothing"), ("unknown", "test_always"))
    ]
    [(file, tests)] = files_of_tests(faults, tree).items()
    assert file == "test_one.py" and set(failing_without_a_fault(tests, files, tree)) == {"test_one.py::test_always"}
    outcomes = {outcome.fault.name: outcome for outcome in outcomes_of(faults, files, tree, 2)}
    assert {name: outcome.problem for name, outcome in outcomes.items()} == {
        "seen": None,
        "lives": "LIVES: its tests pass",
        "unknown": "test_one.py::test_always fails without the fault",
    }
    assert "assert 1 == 3" in outcomes["unknown"].output
    assert table(list(outcomes.values())).splitlines()[1].split()[:4] == ["cli", "3", "1", "2"]
    planted_at_once = {outcome.fault.name: outcome for outcome in outcomes_of(faults, files, tree, 2, at_once=True)}
    assert planted_at_once["unknown"].problem is None


def test_a_file_that_cannot_be_run_proves_nothing(tree):
    (tree / "test_one.py").write_text("import no_such_module\n\n\ndef test_value():\n    pass\n")
    files = [path.relative_to(tree) for path in tree.rglob("*.py")]
    fault = Fault("cli", "a fault", "fitune/one.py", "return 1", "return 2", ("test_one.py::test_value",))
    [outcome] = outcomes_of([fault], files, tree, 1)
    assert outcome.problem == "test_one.py fails without the fault"


@pytest.mark.parametrize("under_git", [True, False])
def test_what_is_copied(under_git, tree):
    """Files that git ignores are no part of the tree; without git, nor are hidden folders and what runs leave."""
    for name in (".venv/lib.py", "runs/log.txt", "fitune/__pycache__/one.pyc"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    if under_git:
        (tree / ".gitignore").write_text("/.venv\n/runs\n__pycache__\n")
        subprocess.run(["git", "init", "--quiet", tree], check=True)
    found = {str(path) for path in files_of_the_tree(tree)} - {".gitignore"}
    assert found == {"fitune/__init__.py", "fitune/one.py", "test_one.py"}


def test_the_command_names_what_it_does_not_know():
    command = [sys.executable, str(ROOT / "tests/planted/plant.py")]
    for arguments, said in ((["trainig"], "no wing trainig"), (["--match", "no such fault"], "no fault matches")):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and said in done.stderr
