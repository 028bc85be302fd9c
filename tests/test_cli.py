"""The command line as a user meets it: quick answers, help, and what is typed reaches the ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from results import empty_adapter

from fitune import environment
from fitune.errors import UsageError
from fitune.launching import roll_call
from fitune.training import eval_command, generate_command, train_command

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("given", "level"), [(None, "ERROR"), ("INFO", "INFO")])
def test_torch_prints_no_page_of_warnings_unless_asked_to(given, level, monkeypatch):
    from fitune.cli import main

    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    if given:
        monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", given)
    monkeypatch.setattr(sys, "argv", ["fitune", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == level


def test_every_command_has_an_example(cli):
    from fitune.cli import cli as group

    for name, command in group.commands.items():
        shown = cli(name, "--help").output.splitlines()
        for example in command.epilog.splitlines():
            assert example.split()[0] == name and f"  python cli.py {example}" in shown
        assert max(map(len, shown)) <= 80 and "RANGE" not in "".join(shown), name


def test_the_list_of_commands_is_in_the_order_of_the_work_and_nothing_is_cut_off(cli):
    shown = cli("--help").output
    commands = shown.partition("Commands:")[2].partition("Examples:")[0]
    listed = re.findall(r"^  (\w+)  ", commands, flags=re.MULTILINE)
    work = ["list", "plan", "prepare", "train", "eval", "merge", "push"]
    assert [name for name in listed if name in work] == work
    assert "..." not in commands and all(len(line) <= 80 for line in shown.splitlines())


def test_show_gives_run_yaml_and_the_launch_line(cli):
    result = cli("show", "llama3_70b_qlora", "--profile", "fsdp_4x24gb", "--set", "training.learning_rate=1e-4")
    assert result.exit_code == 0
    assert "learning_rate: 0.0001" in result.output
    assert "gradient_accumulation_steps: 1" in result.output
    assert "accelerate launch --config_file" in result.output.splitlines()[-1]
    assert "-m fitune.training.train" in result.output.splitlines()[-1]


def test_every_environment_variable_is_in_the_help(cli):
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "fitune").rglob("*.py")]
    named = {name for text in sources for name in re.findall(r"\bFITUNE_[A-Z_]+", text)}
    assert named == set(re.findall(r"\bFITUNE_[A-Z_]+", cli("--help").output))


@pytest.mark.parametrize("value", ["soon", "0", "-3", "nan"])
def test_a_variable_that_is_no_number_is_named(monkeypatch, value):
    monkeypatch.setenv(environment.HUNG_AFTER, value)
    with pytest.raises(UsageError, match=rf"{environment.HUNG_AFTER}={value}: expected a number above 0, as in"):
        environment.number(environment.HUNG_AFTER, 45)


def test_a_variable_that_is_not_set_has_its_default(monkeypatch):
    monkeypatch.setenv(environment.HUNG_AFTER, "90")
    assert environment.number(environment.HUNG_AFTER, 45) == 90
    monkeypatch.delenv(environment.HUNG_AFTER)
    assert environment.number(environment.HUNG_AFTER, 45) == 45


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no memory")])
@pytest.mark.parametrize("name, code", [("list", 130), ("train", 75)])
def test_ctrl_c_and_memory_that_ran_out_are_one_line(cli, monkeypatch, name, code, error):
    from fitune.cli import cli as group

    def stop(**_):
        raise error

    monkeypatch.setattr(group.commands[name], "callback", stop)
    result = cli(name, *(["tiny_qlora"] if name == "train" else []))
    [line] = result.output.splitlines()
    if isinstance(error, KeyboardInterrupt):
        assert result.exit_code == code and line.startswith("stopped")
    else:
        assert result.exit_code == 1 and line.startswith("error: host RAM ran out asking for more; ")


def test_ctrl_c_while_the_command_line_is_imported(monkeypatch, capsys):
    from fitune.__main__ import main

    def interrupted(name, *_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.__import__", interrupted)
    with pytest.raises(SystemExit) as caught:
        main()
    monkeypatch.undo()
    assert caught.value.code == 130 and capsys.readouterr().err == "stopped\n"


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


@pytest.fixture
def finished(tmp_path):
    """A run's folder with a result, and a checkpoint that nobody looks into."""
    from fitune.config import run as runs
    from fitune.launching.run_folder import finish

    run = runs.resolve("tiny_qlora", "cpu_2proc", (), str(tmp_path / "run"))
    for folder in (run.folder, run.folder / "checkpoints/checkpoint-1"):
        empty_adapter(folder / "adapter")
    (run.folder / "run.yaml").write_text(runs.dump(run))
    finish(run, 1, 1.0)
    return run.folder


@pytest.mark.parametrize("code", [0, 1, 75])
def test_what_is_typed_reaches_the_ranks_and_their_exit_code_the_shell(cli, finished, monkeypatch, code):
    started = []
    monkeypatch.setattr(roll_call, "launch_until_stopped", lambda run, *words, **_: started.append(words) or code)
    for module in (eval_command, generate_command):
        monkeypatch.setattr(module, "check_data", lambda run, **about: None)
    monkeypatch.setattr("fitune.training.manifest.find_damage", lambda folder: None)
    checkpoint = finished / "checkpoints/checkpoint-1"
    assert cli("eval", finished).exit_code == code
    assert cli("eval", checkpoint, "--force").exit_code == code
    words = ["--prompt", "a", "--prompt", "-b", "--max-new-tokens", "7", "--temperature", "0.5", "--force"]
    assert cli("generate", checkpoint, *words, "--test", "3", "--json", "out.json").exit_code == code
    module = "fitune.training."
    assert started[:2] == [
        (f"{module}evaluate",),
        (f"{module}evaluate", "--checkpoint", str(checkpoint), "--force"),
    ]
    [name, *arguments] = started[2]
    assert name == f"{module}generate"
    from fitune.training.asked import parse_options

    options = parse_options([str(finished), *arguments])
    assert (options.prompt, options.max_new_tokens, options.temperature) == (["a", "-b"], 7, 0.5)
    assert (options.force, options.test, str(options.json)) == (True, 3, "out.json")
    assert options.checkpoint == str(checkpoint)


@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_run_that_failed_is_not_said_to_have_a_result(cli, monkeypatch, tiny_base, tmp_path, code):
    for name in ("check_before_training", "fetch_base", "check_data"):
        monkeypatch.setattr(train_command, name, lambda run, **options: None)
    monkeypatch.setattr(train_command, "train_with_restarts", lambda run, **options: code)
    monkeypatch.setattr("fitune.config.run.check_paths", lambda *names: None)
    base = f"base.model={tiny_base}"
    result = cli("train", "tiny_qlora", "--profile", "cpu_2proc", "--output", tmp_path / "run", "--set", base)
    assert result.exit_code == code, result.output
    assert ("result:" in result.output) == (code == 0)


def test_a_resumed_run_keeps_the_rows_that_plan_chose_for_it(cli, tmp_path):
    from fitune.config import run as runs

    asked = runs.resolve("llama3_8b_qlora", "single_gpu", (), str(tmp_path / "run"))
    started = runs.with_numbers(asked, micro_batch=4, kept_layers=3)
    started.folder.mkdir()
    (started.folder / "run.yaml").write_text(runs.dump(started))
    result = cli(
        "train", "llama3_8b_qlora", "--profile", "single_gpu", "--output", started.folder, "--resume", "--dry-run"
    )
    assert "micro_batch: 4" in result.output and "kept_layers: 3" in result.output, result.output


def test_prepare_takes_the_recipes_values_unless_others_are_typed(cli, monkeypatch):
    given = []
    monkeypatch.setattr("fitune.data.prepare_command.prepare", lambda data, output, **options: given.append(options))
    for words in ((), ("--max-length", 77, "--set", "seed=7")):
        assert cli("prepare", "tiny_qlora", "--no-tokens", *words).exit_code == 0
    recipe, typed = given
    assert (recipe["max_length"], recipe["seed"], recipe["global_batch_size"]) == (512, 42, 4)
    assert (typed["max_length"], typed["seed"]) == (77, 7)


@pytest.mark.parametrize(("works", "code"), [(True, 0), (False, 1)])
def test_doctor_ends_with_1_where_training_cannot_work(cli, monkeypatch, works, code):
    monkeypatch.setattr("fitune.launching.doctor.doctor", lambda model: works)
    assert cli("doctor").exit_code == code


def test_doctor_names_every_finding_and_what_to_do(cli, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    result = cli("doctor", "--model", "./nowhere")
    lines = result.output.splitlines()
    for name in (
        "python",
        "packages",
        "torch",
        "GPUs",
        "host RAM",
        "disk",
        "disk speed",
        "login",
        "base model",
    ):
        assert any(line.startswith(("ok", "bad", "--")) and f" {name} " in line for line in lines), name
    assert "./nowhere: no such folder" in result.output
    assert result.exit_code in (0, 1) and "Traceback" not in result.output


@pytest.mark.parametrize("command", [["eval", "--tasks", "hellaswag"], ["generate", "--prompt", "Hi"]])
@pytest.mark.parametrize(("file", "said"), [("gone/a.json", "there is no folder {0}/gone"), ("", "is a folder")])
def test_a_json_file_that_cannot_be_written_is_said_at_the_start(cli, tmp_path, command, file, said):
    """Not after hours, when it would be written: nothing of the model is looked at."""
    result = cli(*command, "--json", tmp_path / file, tmp_path / "model")
    assert result.exit_code == 2
    assert result.stderr == f"error: --json {tmp_path / file}: {said.format(tmp_path)}; name a file\n"


def test_a_missing_package_is_told_in_one_line(tmp_path):
    """As for the Python of the system, started in place of that of .venv; --debug shows where it was wanted."""
    script = (
        "import sys; sys.modules['psutil'] = None; sys.argv = ['cli.py', *sys.argv[1:]]; "
        "from fitune.__main__ import main; main()"
    )
    asked = ["generate", str(tmp_path), "--prompt", "Hi"]
    done, debugged = (
        subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True)
        for words in (asked, ["--debug", *asked])
    )
    assert done.returncode == 1 and "Traceback" in debugged.stderr
    installs = "run: make setup, then source .venv/bin/activate"
    assert done.stderr == f"error: psutil is not installed for {sys.executable}; {installs}\n"
