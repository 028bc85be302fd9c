"""Where the files lie that ship with the code: recipes, profiles, accelerate configs, examples.

In a checkout they are folders at the top, where a reader looks for them. `pip install` puts them into
`fitune/shipped/` (see pyproject.toml). Either way they are found from any working folder.
"""

import importlib.metadata
import shlex
import shutil
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "shipped"
CHECKOUT: Path | None = None if _INSTALLED.is_dir() else _PACKAGE.parent
"The folder with README.md and cli.py, or None where fitune was installed from a wheel."
SHIPPED = CHECKOUT or _INSTALLED
RECIPES = SHIPPED / "recipes"
PROFILES = RECIPES / "memory_profiles"
ACCELERATE_CONFIGS = SHIPPED / "accelerate_configs"
EXAMPLES = SHIPPED / "examples"


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
