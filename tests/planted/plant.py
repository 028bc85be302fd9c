"""Plants each fault of the list in a copy of the tree and runs the tests that should notice it there.

    make planted JOBS=8     or  python tests/planted/plant.py training model --match dropout --jobs 2

Not mutmut or Cosmic Ray: both make up the faults by rules of their own, so that neither can be given a list of chosen
ones, each with the tests that must notice it.

Tests run without a fault first: where one fails there, its failing would prove nothing. Exit code 1 if a fault
lives, if it cannot be planted, or if its tests could not be run.
"""

import argparse
import json
import os
import re
import sys
import time
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from copies import copied, files_of_the_tree, is_imported_from, run_tests
from fault_list import ROOT, WINGS, Fault, missing_tests, planted, read_faults

TIMEOUT_SECONDS = 600
"For one fault's tests, which take seconds each on an idle machine."
TESTS_FAILED = 1  # pytest's exit code; the others say that it could not run them
NAMED_AS_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What a fault's tests said. `problem` is None where the fault was noticed."""

    fault: Fault
    seconds: float
    problem: str | None
    output: str = ""

    def record(self) -> dict:
        """One entry of the JSON file."""
        entry = asdict(self.fault) | {"noticed": self.problem is None, "problem": self.problem}
        return entry | {"seconds": round(self.seconds, 1), "output": self.output[-4000:] if self.problem else ""}


def plant(fault: Fault, files: list[Path], root: Path = ROOT, timeout: float = TIMEOUT_SECONDS) -> Outcome:
    """Plants `fault` in a copy of `files` (paths from `root` on) and runs its tests there."""
    started = time.monotonic()
    try:
        changed = planted(fault, root)
    except (OSError, SyntaxError, ValueError) as error:
        return Outcome(fault, 0, f"cannot be planted: {error}")
    if missing := missing_tests(fault, root):
        return Outcome(fault, 0, f"no such test: {missing[0]}")
    with copied(files, root) as tree:
        (tree / fault.file).write_text(changed, encoding="utf-8")
        code, output = run_tests(tree, fault.tests, timeout, "-x")
    problem = {TESTS_FAILED: None, 0: "LIVES: its tests pass", None: f"no verdict after {timeout:.0f} s"}.get(
        code, f"its tests could not be run (pytest's exit code {code})"
    )
    return Outcome(fault, time.monotonic() - started, problem, output)


def files_of_tests(faults: list[Fault], root: Path) -> dict[str, tuple[str, ...]]:
    """The tests that must pass without a fault, so that their failing with one says something."""
    of_file: dict[str, dict[str, None]] = defaultdict(dict)
    for fault in faults:
        if not missing_tests(fault, root):
            for test in fault.tests:
                of_file[_file(test)][test] = None
    return {file: tuple(tests) for file, tests in of_file.items()}


def failing_without_a_fault(tests: tuple[str, ...], files: list[Path], root: Path) -> dict[str, str]:
    """What fails of these tests of one file in an unchanged copy: a test's id, or the file's where it could not be run,
    to what was printed."""
    with copied(files, root) as tree:
        code, output = run_tests(tree, tests, TIMEOUT_SECONDS, "-rfE")
    if code == 0:
        return {}
    named = NAMED_AS_FAILED.findall(output) if code == TESTS_FAILED else [_file(tests[0])]
    return dict.fromkeys(named, output[-4000:])


def proves_nothing(fault: Fault, failing: dict[str, str]) -> str | None:
    """The one of `failing` that is among the fault's tests, if there is one."""
    for test in fault.tests:
        for failed in failing:
            if failed == test or failed.startswith((f"{test}::", f"{test}[")) or test.startswith(f"{failed}::"):
                return failed
    return None


def outcomes_of(faults: list[Fault], files: list[Path], root: Path, jobs: int, *, at_once: bool = False):
    """Yields each fault's outcome as its tests end.

    A fault is planted once its tests have run without it, or `at_once`. No fault waits for another one's tests.
    """
    with ThreadPoolExecutor(jobs) as threads:
        unchanged = {} if at_once else files_of_tests(faults, root)
        running: dict[Future, str | None] = {
            threads.submit(failing_without_a_fault, tests, files, root): file for file, tests in unchanged.items()
        }
        "What is run to the file whose tests it is, None for a planted fault."
        failing, waiting = {}, list(faults)
        while running or waiting:
            unfinished = {file for file in running.values() if file}
            for fault in [fault for fault in waiting if not unfinished & set(map(_file, fault.tests))]:
                waiting.remove(fault)
                if failed := proves_nothing(fault, failing):
                    yield Outcome(fault, 0, f"{failed} fails without the fault", failing[failed])
                else:
                    running[threads.submit(plant, fault, files, root)] = None
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                if running.pop(ended):
                    failing |= ended.result()
                else:
                    yield ended.result()


def _file(test: str) -> str:
    return test.partition("::")[0]


def say(outcome: Outcome) -> None:
    fault = outcome.fault
    print(
        f"{'PROBLEM' if outcome.problem else 'noticed'}  {outcome.seconds:5.1f} s  {fault.wing}: {fault.name}",
        flush=True,
    )
    if outcome.problem:
        print(f"    {outcome.problem}\n    {fault.file}: {fault.text!r} -> {fault.becomes!r}")
        print(f"    {' '.join(fault.tests)}\n{outcome.output[-1500:]}")
    sys.stdout.flush()


def table(outcomes: list[Outcome]) -> str:
    """A line for each wing, then one for each fault that was not noticed."""
    lines = [f"{'wing':<12}{'faults':>7}{'noticed':>9}{'problems':>10}{'seconds':>9}"]
    for wing in [*WINGS, "all"]:
        of_wing = [outcome for outcome in outcomes if wing in (outcome.fault.wing, "all")]
        if of_wing:
            problems = sum(outcome.problem is not None for outcome in of_wing)
            seconds = sum(outcome.seconds for outcome in of_wing)
            counts = f"{len(of_wing):>7}{len(of_wing) - problems:>9}{problems:>10}{seconds:>9.0f}"
            lines.append(f"{wing:<12}{counts}")
    bad = [outcome for outcome in outcomes if outcome.problem]
    return "\n".join(lines + [f"{outcome.fault.wing}: {outcome.fault.name}: {outcome.problem}" for outcome in bad])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wings", nargs="*", metavar="WING", help=f"of {', '.join(WINGS)}; all if none is given")
    parser.add_argument("--match", default="", help="only faults whose name or file has this text")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="faults at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write each outcome to FILE, as it comes")
    parser.add_argument("--at-once", action="store_true", help="don't run the tests without a fault first")
    options = parser.parse_args()
    if unknown := set(options.wings) - set(WINGS):
        parser.error(f"no wing {min(unknown)}; allowed: {', '.join(WINGS)}")
    faults = [fault for wing in options.wings or WINGS for fault in read_faults(wing)]
    faults = [fault for fault in faults if options.match in f"{fault.name} {fault.file}"]
    if not faults:
        parser.error(f"no fault matches {options.match!r}")
    files = files_of_the_tree()
    with copied(files, ROOT) as root:  # whoever works on meanwhile changes nothing
        if not is_imported_from(root):
            print("fitune is not imported from the copy: no fault would be in what is tested", file=sys.stderr)
            return 1
        return plant_all(faults, files, root, options)


def plant_all(faults: list[Fault], files: list[Path], root: Path, options: argparse.Namespace) -> int:
    """Exit code; says and writes each outcome as it comes."""
    outcomes = []
    for outcome in outcomes_of(faults, files, root, options.jobs, at_once=options.at_once):
        outcomes.append(outcome)
        say(outcome)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps([outcome.record() for outcome in outcomes], indent=1))
    print(table(outcomes))
    return 1 if any(outcome.problem for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
