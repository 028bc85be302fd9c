"""Whatever is wrong with a command line is one line, with exit code 2, and leaves nothing behind."""

import pytest

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
    "prompt beside a chat": (["generate", "nowhere", "--chat", "--prompt", "Hi"], "leave out --prompt, or --chat\n"),
    "answers of a chat": (["generate", "nowhere", "--chat", "--json", "a.json"], "/save FILE writes the conversation"),
    "prompt to a server": (["generate", "nowhere", "--serve", "80", "--text", "x"], "over its port: leave out --text"),
    "bytes that are no text": (["generate", "x", "--prompt", "caf\udce9"], "--prompt 'caf\\udce9' is not UTF-8"),
    "temperature of a server": (["generate", "x", "--serve", "80", "--temperature", "1"], "leave out --temperature"),
    "weights of a server": (["generate", "x", "--serve", "80", "--load", "nf4"], "model by itself: leave out --load"),
    "seed where nothing is drawn": (["generate", "nowhere", "--prompt", "x", "--seed", "1"], "add --temperature T"),
    "merge of no run": (["merge", "nowhere", "--output", "out"], "nowhere"),
    "prepare of nothing": (["prepare"], "--dataset"),
    "prepare of a missing file": (["prepare", "--dataset", "rows.jsonl", "--output", "out"], "rows.jsonl"),
    "missing option": (["merge", "runs/none"], "error: missing option '--output'; see `"),
    "unknown command": (["trian", "tiny_qlora"], "error: no such command 'trian'; did you mean 'train'?"),
    "unknown option": (
        ["plan", "tiny_qlora", "--gpuss", "2"],
        "error: no such option '--gpuss'; did you mean '--gpu', ",
    ),
    "no number": (
        ["plan", "tiny_qlora", "--gpus", "two"],
        "error: invalid value for '--gpus': 'two' is not a valid int",
    ),
    "a folder that is no run": (["train", "./", "--resume"], "error: .: no run's folder, which holds a run.yaml"),
    "nan": (
        ["plan", "tiny_lora", "--gpus", "2", "--gpu-memory", "nan"],
        "error: invalid value for '--gpu-memory': nan is not a finite number",
    ),
    "a price without end": (
        ["plan", "tiny_lora", "--price-per-hour", "inf"],
        "error: invalid value for '--price-per-hour': inf is not a finite number",
    ),
    "RAM below zero": (
        ["plan", "tiny_lora", "--gpus", "1", "--gpu-memory", "8", "--host-memory", "-3"],
        "error: invalid value for '--host-memory': -3.0 is not in the range x>0",
    ),
    "choices": (
        ["submit", "tiny_lora"],
        "error: missing option '--on'. Choose from: slurm, skypilot, kubernetes; see `python cli.py submit --help`",
    ),
    "an option without its value": (
        ["plan", "tiny_lora", "--set"],
        "error: option '--set' requires an argument; see `python cli.py plan --help`",
    ),
    "an unknown option of no command": (
        ["--foo"],
        "error: no such option '--foo'; see `python cli.py --help`",
    ),
    "two datasets": (
        ["prepare", "tiny_lora", "--dataset", "a.jsonl", "--dataset", "b.jsonl"],
        "error: --dataset is given 2 times; give one: several are a recipe's data.mix",
    ),
}


@pytest.mark.parametrize("arguments, expected", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(cli, tmp_path, arguments, expected):
    (tmp_path / "broken.yaml").write_text("description: x\n  method: [full\n")
    before = sorted(tmp_path.rglob("*"))
    result = cli(*arguments)
    assert result.exit_code == 2, result.output
    assert any(part in result.output for part in expected.split("|")), result.output
    assert "Traceback" not in result.output
    assert result.output.startswith("error: ") and result.output.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before, "nothing may be left behind"
