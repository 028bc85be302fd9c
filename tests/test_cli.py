"""The command line as a user meets it: quick answers, and one line with exit code 2 for whatever is wrong."""

from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Runs a command line in an empty folder; returns click's result."""
    from fitune.cli import cli as group

    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(group, [str(argument) for argument in arguments])


def test_every_command_has_an_example(cli):
    from fitune.cli import cli as group

    for name, command in group.commands.items():
        assert command.epilog.startswith("Example:"), name
        assert (
            command.epilog in " ".join(cli(name, "--help").output.split()).replace("  ", " ")
            or "Example:" in cli(name, "--help").output
        )


def test_show_gives_run_yaml_and_the_launch_line(cli):
    result = cli("show", "llama3_70b_qlora", "--profile", "fsdp_4x24gb", "--set", "training.learning_rate=1e-4")
    assert result.exit_code == 0
    assert "learning_rate: 0.0001" in result.output
    assert "gradient_accumulation_steps: 2" in result.output
    assert "accelerate launch --config_file" in result.output.splitlines()[-1]
    assert "-m fitune.training.train" in result.output.splitlines()[-1]


BAD = {
    "unknown recipe": (["show", "tiny_qlra", "--profile", "cpu_2proc"], "did you mean 'tiny_qlora'"),
    "unknown profile": (["show", "tiny_qlora", "--profile", "cpu_3proc"], "did you mean 'cpu_2proc'"),
    "profile of another method": (["show", "llama3_70b_full", "--profile", "fsdp_4x24gb"], "fsdp_full_16x80gb"),
    "set without value": (["show", "tiny_qlora", "--profile", "cpu_2proc", "--set", "seed"], "expected key=value"),
    "set of a wrong type": (["show", "tiny_qlora", "--profile", "cpu_2proc", "--set", "seed=x"], "seed"),
    "set of an unknown key": (
        ["show", "tiny_qlora", "--profile", "cpu_2proc", "--set", "sede=1"],
        "did you mean 'seed'",
    ),
    "field owned elsewhere": (
        ["show", "tiny_qlora", "--profile", "cpu_2proc", "--set", "training.bf16=true"],
        "mixed_precision",
    ),
    "broken recipe file": (["show", "broken.yaml", "--profile", "cpu_2proc"], "broken.yaml:2"),
    "data not prepared": (["train", "tiny_qlora", "--profile", "cpu_2proc"], "run: python cli.py prepare tiny_qlora"),
    "resume of nothing": (
        ["train", "tiny_qlora", "--profile", "cpu_2proc", "--output", "empty", "--resume"],
        "prepare|resume",
    ),
    "eval of no run": (["eval", "nowhere"], "nowhere"),
    "generate of no run": (["generate", "nowhere", "--prompt", "x"], "nowhere"),
    "generate without a question": (["generate", "nowhere"], "--prompt"),
    "merge of no run": (["merge", "nowhere", "--output", "out"], "nowhere"),
    "prepare of nothing": (["prepare"], "--dataset"),
    "prepare of a missing file": (["prepare", "--dataset", "rows.jsonl", "--output", "out"], "rows.jsonl"),
    "missing option": (["show", "tiny_qlora"], "--profile"),
}


@pytest.mark.parametrize("arguments, expected", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(cli, tmp_path, arguments, expected):
    (tmp_path / "broken.yaml").write_text("description: x\n  method: [full\n")
    before = sorted(tmp_path.rglob("*"))
    result = cli(*arguments)
    assert result.exit_code == 2, result.output
    assert any(part in result.output for part in expected.split("|")), result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.output.splitlines() if line.lower().startswith("error")]
    assert len(errors) == 1
    assert sorted(tmp_path.rglob("*")) == before, "nothing may be left behind"


def test_a_folder_of_something_else_is_never_overwritten(cli, tmp_path):
    from fitune.demo.tiny_base import build_tiny_base

    build_tiny_base(tmp_path / "base", num_layers=1)
    (tmp_path / "data").mkdir()
    row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(row)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")
    sets = ["--set", f"base.model={tmp_path / 'base'}", "--set", f"data.prepared={tmp_path / 'data'}"]
    result = cli("train", "tiny_qlora", "--profile", "cpu_2proc", "--output", tmp_path / "run", *sets)
    assert result.exit_code == 2
    assert "is not a run's folder; choose another --output" in result.output
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


def test_completion_scripts(cli):
    for shell in ("bash", "zsh", "fish"):
        assert "_CLI_PY_COMPLETE" in cli("completion", shell).output


def test_doctor_names_every_finding_and_what_to_do(cli, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    result = cli("doctor", "--model", "./nowhere")
    lines = result.output.splitlines()
    for name in ("python", "packages", "torch", "GPUs", "host RAM", "disk", "login", "base model", "best profile"):
        assert any(line.startswith(("ok", "bad", "--")) and f" {name} " in line for line in lines), name
    assert "./nowhere: no such folder" in result.output
    assert result.exit_code in (0, 1) and "Traceback" not in result.output
