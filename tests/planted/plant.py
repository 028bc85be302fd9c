"""Plants each fault of the list in a copy of the tree and runs the tests that should notice it there.

    make planted        or  python tests/planted/plant.py training model --match dropout

Not mutmut or Cosmic Ray: both make up the faults by rules of their own, so that neither can be given a list of chosen
ones, each with the tests that must notice it.

First the tests pass without a fault, or their failing would prove nothing. Exit code 1 if a fault lives, if it cannot
be planted, or if its tests could not be run.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fault_list import ROOT, WINGS, Fault, missing_tests, planted, read_faults

TIMEOUT_SECONDS = 600
"For one fault's tests, which take seconds each on an idle machine."
TESTS_FAILED = 1  # pytest's exit code; the others say that it could not run them


@dataclass(frozen=True)
class Outcome:
    """What a fault's tests said. `problem` is None where the fault was noticed."""

    seconds: float
    problem: str | None
    output: str = ""


def plant(fault: Fault, files: list[Path], root: Path = ROOT, timeout: float = TIMEOUT_SECONDS) -> Outcome:
    """Plants `fault` in a copy of `files` (paths from `root` on) and runs its tests there."""
    started = time.monotonic()
    try:
        changed = planted(fault, root)
    except (OSError, SyntaxError, ValueError) as error:
        return Outcome(0, f"cannot be planted: {error}")
    if missing := missing_tests(fault, root):
        return Outcome(0, f"no such test: {missing[0]}")
    with tempfile.TemporaryDirectory(prefix="planted-", ignore_cleanup_errors=True) as name:
        tree = copy_tree(files, root, Path(name) / "tree")
        (tree / fault.file).write_text(changed, encoding="utf-8")
        code, output = run_tests(tree, fault.tests, timeout)
    problem = {TESTS_FAILED: None, 0: "LIVES: its tests pass", None: f"no verdict after {timeout:.0f} s"}.get(
        code, f"its tests could not be run (pytest's exit code {code})"
    )
    return Outcome(time.monotonic() - started, problem, output)


def copy_tree(files: list[Path], root: Path, tree: Path) -> Path:
    for file in files:
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / file, tree / file)
    return tree


def run_tests(tree: Path, tests: tuple[str, ...], timeout: float | None) -> tuple[int | None, str]:
    """(pytest's exit code, None where it took too long; what it printed) of tests in a copy of the tree."""
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=short", f"--basetemp={tree.parent / 'temporary'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=tree, env=_environment(tree), text=True, errors="replace", start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        _end_with_children(process)
    return process.returncode, output


def _environment(tree: Path) -> dict[str, str]:
    """The copy comes first on the import path; with no bytecode kept, a file of the same size and second is read."""
    return os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def _end_with_children(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def files_of_the_tree(root: Path = ROOT) -> list[Path]:
    """What git tracks or would, from `root` on."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [Path(name) for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def pass_without_a_fault(faults: list[Fault], files: list[Path], root: Path) -> bool:
    """Runs all that these faults' tests are, in an unchanged copy, and says what fails there."""
    tests = tuple(dict.fromkeys(test for fault in faults for test in fault.tests))
    with tempfile.TemporaryDirectory(prefix="planted-", ignore_cleanup_errors=True) as name:
        tree = copy_tree(files, root, Path(name) / "tree")
        check = "import fitune, sys; sys.exit(not fitune.__file__.startswith(sys.argv[1]))"
        command = [sys.executable, "-c", check, str(tree)]
        if subprocess.run(command, cwd=name, env=_environment(tree), check=False).returncode:
            print("fitune is not imported from the copy: no fault would be in what is tested", file=sys.stderr)
            return False
        started = time.monotonic()
        code, output = run_tests(tree, tests, timeout=None)
    if code:
        print(f"{output[-4000:]}\nthe tests fail without a fault: nothing can be said", file=sys.stderr)
        return False
    print(f"without a fault {len(tests)} files and tests pass ({time.monotonic() - started:.0f} s)", flush=True)
    return True


def plant_all(faults: list[Fault], files: list[Path], root: Path, jobs: int) -> int:
    """How many were not noticed; prints a line for each as its tests end."""
    left = 0
    with ThreadPoolExecutor(jobs) as threads:
        for fault, outcome in zip(faults, threads.map(lambda fault: plant(fault, files, root), faults), strict=True):
            verdict = "noticed" if outcome.problem is None else "PROBLEM"
            print(f"{verdict}  {outcome.seconds:5.1f} s  {fault.wing}: {fault.name}", flush=True)
            if outcome.problem:
                left += 1
                print(f"    {outcome.problem}\n    {fault.file}: {fault.text!r} -> {fault.becomes!r}")
                print(f"    {' '.join(fault.tests)}\n{outcome.output[-1500:]}", flush=True)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wings", nargs="*", metavar="WING", help=f"of {', '.join(WINGS)}; all if none is given")
    parser.add_argument("--match", default="", help="only faults whose name or file has this text")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="faults at a time")
    parser.add_argument("--at-once", action="store_true", help="don't run the tests without a fault first")
    options = parser.parse_args()
    if unknown := set(options.wings) - set(WINGS):
        parser.error(f"no wing {min(unknown)}; allowed: {', '.join(WINGS)}")
    faults = [fault for wing in options.wings or WINGS for fault in read_faults(wing)]
    faults = [fault for fault in faults if options.match in f"{fault.name} {fault.file}"]
    if not faults:
        parser.error(f"no fault matches {options.match!r}")
    files = files_of_the_tree()
    with tempfile.TemporaryDirectory(prefix="planted-", ignore_cleanup_errors=True) as name:
        root = copy_tree(files, ROOT, Path(name))  # whoever works on meanwhile changes nothing
        if not options.at_once and not pass_without_a_fault(faults, files, root):
            return 1
        left = plant_all(faults, files, root, options.jobs)
    print(f"{len(faults)} faults, {left} of them not noticed")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
