"""Fixtures of the tests of recipes, memory profiles and accelerate configs."""

from pathlib import Path

import pytest
from one_run import ACCELERATE, PROFILE, RECIPE


@pytest.fixture
def write(tmp_path):
    """Writes the three files of `one_run`, `old` replaced by `new` in one of them; returns their paths."""

    def write_files(kind: str = "recipe", old: str = "", new: str = "") -> dict[str, Path]:
        paths = {name: tmp_path / f"{name}_8b.yaml" for name in ("recipe", "profile", "accelerate")}
        texts = {"recipe": RECIPE, "profile": PROFILE, "accelerate": ACCELERATE}
        assert old in texts[kind], old
        texts[kind] = texts[kind].replace(old, new, 1)
        for name, path in paths.items():
            path.write_text(texts[name].replace("ACCELERATE", str(paths["accelerate"])), encoding="utf-8")
        return paths

    return write_files
