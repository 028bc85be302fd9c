"""What `pip install .` would install: built here without a network, unpacked, and used from another folder."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

import fitune

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("recipes/**/*.yaml", "accelerate_configs/*.yaml", "examples/**/*")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in ("fitune", "recipes", "accelerate_configs", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "NOTICE",
        "requirements.txt",
        "requirements-gpu.txt",
        "requirements-gguf.txt",
    ):
        shutil.copy(ROOT / file, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def metadata(installed: Path):
    [file] = installed.glob("*.dist-info/METADATA")
    return message_from_string(file.read_text(encoding="utf-8"))


def requirements(name: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return sorted(line for line in lines if line)


def _path(installed: Path) -> str:
    return os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])


def call(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": _path(installed)}
    command = [sys.executable, "-m", "fitune", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_requires_what_requirements_txt_pins(installed):
    required = metadata(installed).get_all("Requires-Dist")
    for extra in ("gpu", "gguf"):
        of_extra = [re.sub(r"\s*;.*", "", line) for line in required if f'extra == "{extra}"' in line]
        assert sorted(of_extra) == requirements(f"requirements-{extra}.txt")
    assert sorted(line for line in required if "extra ==" not in line) == requirements("requirements.txt")


def test_the_version_is_written_once(installed):
    assert metadata(installed)["Version"] == fitune.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project and "dependencies" not in project


def test_the_wheel_has_every_module_and_shipped_file_and_nothing_else(installed):
    files = {file.relative_to(installed / "fitune") for file in installed.glob("fitune/**/*") if file.is_file()}
    code = {
        file.relative_to(ROOT / "fitune")
        for suffix in ("py", "jinja", "css")
        for file in ROOT.glob(f"fitune/**/*.{suffix}")
    }
    shipped = {Path("shipped") / f.relative_to(ROOT) for glob in SHIPPED for f in ROOT.glob(glob) if f.is_file()}
    assert files == code | shipped
    top = {file.name for file in installed.iterdir()}
    assert top == {"fitune", f"fitune-{fitune.__version__}.dist-info"}


def test_licences_are_in_the_wheel(installed):
    [folder] = installed.glob("*.dist-info/licenses")
    assert {file.name for file in folder.iterdir()} == {"LICENSE", "NOTICE"}
    assert metadata(installed)["License-Expression"] == "Apache-2.0"


def test_installed_commands_work_from_another_folder(installed, tmp_path):
    listed = call(installed, tmp_path, "list")
    assert listed.returncode == 0 and "llama3_70b_qlora" in listed.stdout and "fsdp_4x24gb" in listed.stdout
    plan = call(installed, tmp_path, "plan", "llama3_70b_qlora", "--profile", "fsdp_4x24gb")
    assert plan.returncode == 0 and "GPU memory  fits: " in plan.stdout, plan.stderr
    shown = call(installed, tmp_path, "show", "tiny_qlora", "--profile", "cpu_2proc")
    assert f"dataset: {installed}/fitune/shipped/examples/instructions/short_answers.jsonl" in shown.stdout
    prepared = call(installed, tmp_path, "prepare", "tiny_qlora", "--output", "mine")
    assert prepared.returncode == 0, prepared.stderr
    assert "models/tiny-base: made, the tiny Llama base model of tiny_qlora" in prepared.stderr
    assert (tmp_path / "mine" / "train.jsonl").is_file() and (tmp_path / "models/tiny-base/tokenizer.json").is_file()
    again = call(installed, tmp_path, "prepare", "tiny_qlora", "--set", "base.model=./elsewhere", "--overwrite")
    assert again.returncode == 2 and "./elsewhere: no such folder" in again.stderr


def test_installed_doctor_knows_the_pins(installed, tmp_path):
    code = (
        "from fitune.config import shipped as s; print(s.CHECKOUT, len(s.pinned_versions()), s.how_to_install('click'))"
    )
    environment = os.environ | {"PYTHONPATH": _path(installed), "PATH": ""}  # no nvidia-smi
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    pins = dict(line.split("==") for line in requirements("requirements.txt"))
    assert said.stdout.strip() == f"None {len(pins)} pip install click=={pins['click']}", said.stderr


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == fitune.__version__
    assert citation["license"] == "Apache-2.0" and citation["cff-version"] == "1.2.0"
