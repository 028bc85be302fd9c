"""No secret is written, logged or passed on; nothing foreign is executed; nothing outside the output folder changes."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import yaml
from click.testing import CliRunner
from patience import PATIENCE_SECONDS

from fitune.cli import cli
from fitune.config import yaml_file

sys.path.insert(0, str(Path(__file__).parent))

from commands import ROOT, train_command

CANARY = "hf_canaryCanaryCanaryCanaryCanary12"


def _files(folder: Path) -> dict[str, str]:
    """Every file under `folder`, links not followed, with a hash of its contents; what git ignores is left out."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not {".git", "__pycache__", ".venv", ".pytest_cache", ".ruff_cache"} & set(path.parts):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _run(command: list[str], environment: dict) -> tuple[str, set[str]]:
    """(what a command printed, the arguments of all processes below it)."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    arguments, over = set(), threading.Event()

    def watch():
        while not over.wait(0.1):
            try:
                for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                    arguments.update(child.cmdline())
            except psutil.Error:
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    printed, _ = process.communicate(timeout=PATIENCE_SECONDS)
    over.set()
    thread.join()
    assert process.returncode == 0, printed[-3000:]
    return printed, arguments


def test_a_whole_run_leaks_no_token_and_writes_only_where_it_was_told(tiny_base, prepared, tmp_path):
    for name in ("home", "tmp", "elsewhere", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere/precious").write_text("1")
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "mine/out").symlink_to(tmp_path / "elsewhere")
    environment = os.environ | {
        "HF_TOKEN": CANARY, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"),
    }  # fmt: skip
    before = {folder: _files(folder) for folder in (ROOT, tiny_base, prepared, tmp_path / "elsewhere")}
    data, run = tmp_path / "link/data", tmp_path / "mine/../link/run"
    python = [sys.executable, "cli.py"]
    rows = ["--dataset", str(prepared / "train.jsonl"), "--tokenizer", str(tiny_base), "--template", "llama3"]
    commands = [
        [*python, "prepare", *rows, "--output", str(data), "--max-length", "256"],
        train_command(tiny_base, data, run, 2),
        [*python, "merge", str(run), "--output", str(tmp_path / "link/merged")],
    ]
    for command in commands:
        printed, arguments = _run(command, environment)
        assert CANARY not in printed
        assert len(arguments) > 3 and not any(CANARY in argument for argument in arguments)
    written = _files(tmp_path)
    assert {"mine/run/adapter/adapter_model.safetensors", "mine/merged/model.safetensors"} <= set(written)
    assert not [name for name in written if CANARY.encode() in (tmp_path / name).read_bytes()]
    for folder, files in before.items():
        assert _files(folder) == files, folder
    strangers = [name for name in written if not name.startswith(("mine/", "home/.cache/", "elsewhere/precious"))]
    assert not strangers
    assert not list((tmp_path / "tmp").iterdir())


def test_code_that_lies_beside_a_model_is_not_run_whatever_is_answered(tiny_base, tmp_path, monkeypatch):
    """transformers would ask on a terminal, and run it after a y."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Evil: ...\n")
    for name, auto_map in (("config.json", {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}),
                           ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", None]})):  # fmt: skip
        content = json.loads((base / name).read_text()) | {"auto_map": auto_map}
        content |= {"model_type": "evil"} if name == "config.json" else {"tokenizer_class": "Evil"}
        (base / name).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for command in (["generate", base, "--prompt", "hi"], ["prepare", "tiny_qlora", "--tokenizer", base, "--output",
                    tmp_path / "data"], ["train", "tiny_qlora", "--profile", "cpu_2proc", "--set", f"base.model={base}",
                    "--output", tmp_path / "run", "--set", f"data.prepared={base}"]):  # fmt: skip
        outcome = CliRunner().invoke(cli, list(map(str, command)))
        assert outcome.exit_code == 2 and outcome.stderr.startswith("error: "), outcome.output
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("path", sorted([*ROOT.glob("fitune/**/*.py"), ROOT / "cli.py"]), ids=lambda p: p.name)
def test_no_code_and_no_pickle_of_strangers_is_loaded(path):
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("trust_remote_code", "False") == "False"
        around = name in ("PeftModel.from_pretrained", "GenerationConfig.from_pretrained")  # a model; numbers alone
        its_own = path.parent.name == "demo"
        if name.endswith((".from_pretrained", ".from_config")) and not (around or its_own):
            assert "trust_remote_code" in keywords, f"{path}:{call.lineno}"
        assert not name.startswith(("pickle.", "cloudpickle.", "joblib.")) and name not in ("eval", "exec")
        assert name not in ("yaml.unsafe_load", "yaml.full_load")
        if name == "yaml.load":
            assert issubclass(getattr(yaml_file, keywords["Loader"]), yaml.SafeLoader)
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"{path}:{call.lineno}"
