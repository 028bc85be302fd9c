"""Where the files lie that ship with the code: recipes, profiles, accelerate configs, examples.

In a checkout they are folders at the top, where a reader looks for them. `pip install` puts them into
`fitune/shipped/` (see pyproject.toml). Either way they are found from any working folder.
"""

import importlib.metadata
import os
import shlex
import shutil
from pathlib import Path

from fitune.errors import UsageError, nearest

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "shipped"
CHECKOUT: Path | None = None if _INSTALLED.is_dir() else _PACKAGE.parent
"The folder with README.md and cli.py, or None where fitune was installed from a wheel."
SHIPPED = CHECKOUT or _INSTALLED
RECIPES = SHIPPED / "recipes"
PROFILES = RECIPES / "memory_profiles"
ACCELERATE_CONFIGS = SHIPPED / "accelerate_configs"
EXAMPLES = SHIPPED / "examples"


def python_path() -> dict[str, str]:
    """The environment variable with which another Python finds this package, whatever its working folder.

    An installed package is found by itself, and its folder must not come before Python's own.
    """
    if not CHECKOUT:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))}


def names(folder: Path) -> list[str]:
    """Names of the YAML files in a folder, without the ending."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find(name: str, folder: Path, kind: str) -> Path:
    """The YAML file called `name` in `folder`, or `name` itself if it is a path to one."""
    if is_path(name):
        if Path(name).is_dir():
            a_run = (Path(name) / "run.yaml").exists()
            what = "a run's folder" if a_run else "a folder without run.yaml"
            raise UsageError(f"{kind} {name}: is {what}; name a {kind} or its .yaml file")
        if not Path(name).is_file():
            raise UsageError(f"{kind} {name}: no such file")
        return Path(name)
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(f"no {kind} called '{name}'{nearest(name, names(folder))}")
    return path


def is_path(name: str) -> bool:
    """Whether a recipe or another file of settings is given by its path, not by the name of one that is shipped."""
    return name.endswith((".yaml", ".yml")) or os.sep in name


def name_of(name: str) -> str:
    """The name of a recipe or another file of settings, however it is given: `llama3.1_8b_qlora` has a dot."""
    return Path(name).name.removesuffix(".yaml").removesuffix(".yml")


def pinned_versions() -> dict[str, str]:
    """Package -> version that fitune runs on here: requirements.txt, and requirements-gpu.txt where there is a GPU."""
    has_gpu = shutil.which("nvidia-smi") is not None
    if CHECKOUT:
        files = ["requirements.txt", *(["requirements-gpu.txt"] if has_gpu else [])]
        lines = [line for file in files for line in (CHECKOUT / file).read_text(encoding="utf-8").splitlines()]
    else:  # the same lines, which the wheel was made with
        required = importlib.metadata.requires("fitune") or []
        lines = [line.split(";")[0] for line in required if has_gpu or "extra ==" not in line]
    pins = (line.split("#")[0].strip() for line in lines)
    return dict(pin.split("==") for pin in pins if "==" in pin)


def how_to_install(*packages: str) -> str:
    """What to type for packages that are missing or of another version."""
    if CHECKOUT:
        return "make setup"
    return shlex.join(["pip", "install", *(f"{name}=={pinned_versions()[name]}" for name in packages)])
