"""Copies of the tree in which tests run by themselves, each in a process group that ends with them."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fault_list import ROOT

for needed in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(needed))

from quick_python import Program  # noqa: E402

NOT_COPIED = ("models", "runs", "__pycache__")
"Folders that are passed over where git cannot say what belongs to the tree; so are those with a dot."


def files_of_the_tree(root: Path = ROOT) -> list[Path]:
    """What git tracks or would, from `root` on; in a folder without git's records, all but NOT_COPIED."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (root / ".git").exists():
        listed = subprocess.run(git, cwd=root, check=True, capture_output=True, text=True)
        return [Path(name) for name in listed.stdout.split("\0") if name and (root / name).is_file()]
    files = []
    for folder, names, found in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".") and name not in NOT_COPIED]
        files += [(Path(folder) / name).relative_to(root) for name in found]
    return files


@contextmanager
def copied(files: list[Path], root: Path) -> Iterator[Path]:
    """A copy of `files` (paths from `root` on) in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="planted-", ignore_cleanup_errors=True) as name:
        tree = Path(name) / "tree"
        for file in files:
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, tree / file)
        yield tree


def run_tests(tree: Path, tests: tuple[str, ...], timeout: float, *options: str) -> tuple[int | None, str]:
    """(pytest's exit code, None where it took too long; what it printed) of tests in a copy of the tree."""
    fixed = ["-q", "-n", "0", "-p", "no:cacheprovider", "--tb=short", f"--basetemp={tree.parent / 'temporary'}"]
    said = tree.parent / "said"
    with said.open("w") as out, Path(os.devnull).open() as nothing:
        streams = nothing.fileno(), out.fileno(), out.fileno()
        process = Program(["-m", "pytest", *fixed, *options, *tests], _environment(tree), tree, streams)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        _end_with_children(process)
    return code, said.read_text(encoding="utf-8", errors="replace")


def _environment(tree: Path) -> dict[str, str]:
    """The copy comes first on the import path; with no bytecode kept, a file of the same size and second is read."""
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def _end_with_children(process: Program) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def is_imported_from(tree: Path) -> bool:
    """Whether `import fitune` finds the copy's; if not, no fault would be in what is tested."""
    check = "import fitune, sys; sys.exit(not fitune.__file__.startswith(sys.argv[1]))"
    command = [sys.executable, "-c", check, str(tree)]
    return not subprocess.run(command, cwd=tree.parent, env=_environment(tree), check=False).returncode
