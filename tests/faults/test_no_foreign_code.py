"""Nothing foreign is executed."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fitune.cli import cli
from fitune.config import yaml_file

sys.path.insert(0, str(Path(__file__).parent))

from commands import ROOT


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
