"""prepare against `datasets.map(num_proc=cores)` on the same rows: rows per second, tokens counted included, and RAM.

    python benchmarks/prepare.py --tokenizer FOLDER --rows 100000
    python benchmarks/prepare.py --tokenizer FOLDER --rows 1000000 --only prepare

The rows are made from examples/instructions by a seed, all different. The datasets side does the same work as TRL and
the usual scripts do it: load_dataset, one map over the rows that checks the turns and looks for control tokens, renders
and tokenises with `apply_chat_template(return_assistant_tokens_mask=True)` and hashes; exact duplicates dropped, split
by seed, written with to_json. Each side runs in a fresh process without a cache; the peak is the sum over its processes
of memory that is not shared (PSS).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    arguments = parse_arguments()
    if arguments.side:
        run_side(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        rows = Path(scratch) / "rows.jsonl"
        write_rows(rows, arguments.rows, arguments.turns)
        print(f"{arguments.rows:,} rows, {rows.stat().st_size / 1e6:,.0f} MB, {arguments.workers} processes")
        results = {side: measure(side, rows, scratch, arguments) for side in arguments.only}
    if len(results) == 2:
        ours, theirs = results["prepare"], results["datasets"]
        if ours["tokens"] != theirs["tokens"]:
            raise SystemExit(f"the two sides disagree: {ours} {theirs}")
        print(
            f"prepare does {ours['rows_per_s'] / theirs['rows_per_s']:.2f} times the rows/s of datasets.map, "
            f"with {ours['cpu_s'] / theirs['cpu_s']:.2f} times its CPU time"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"rows": arguments.rows, "workers": arguments.workers} | results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=1, help="question and answer pairs in each row")
    parser.add_argument("--max-length", type=int, default=3072, help="prepare also packs to rows of so many tokens")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", choices=["prepare", "datasets"], default=["datasets", "prepare"])
    parser.add_argument("--scratch", help="folder with room for the rows; default: the system's")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--side", choices=["prepare", "datasets"], help=argparse.SUPPRESS)
    parser.add_argument("--input", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(path: Path, count: int, turns: int) -> None:
    """Questions and answers of the example rows, recombined by sentence so that hardly two rows are alike."""
    examples = ROOT / "examples" / "instructions" / "instructions.jsonl"
    conversations = [json.loads(line)["messages"] for line in examples.read_text(encoding="utf-8").splitlines()]
    questions = [conversation[0]["content"] for conversation in conversations]
    sentences = [part for conversation in conversations for part in conversation[1]["content"].split(". ")]
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = []
            for _ in range(turns):
                answer = ". ".join(draw.choices(sentences, k=draw.randint(2, 8)))
                question = f"({number}) {draw.choice(questions)}"
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer or "Yes."}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def measure(side: str, rows: Path, scratch: str, arguments) -> dict:
    """Run one side in a process of its own; its wall time counts from the first row to the last file."""
    output = Path(scratch) / side
    command = [sys.executable, __file__, "--side", side, "--input", str(rows), "--output", str(output)]
    command += ["--tokenizer", arguments.tokenizer, "--workers", str(arguments.workers)]
    command += ["--max-length", str(arguments.max_length)]
    environment = os.environ | {"HF_DATASETS_CACHE": f"{scratch}/cache", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak = [0]
    watcher = threading.Thread(target=watch_memory, args=(process, peak))
    watcher.start()
    printed, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{side} failed")
    result = json.loads(printed.splitlines()[-1])
    result |= {"rows_per_s": round(arguments.rows / result["seconds"]), "peak_mib": peak[0] >> 20}
    print(
        f"{side:9} {result['seconds']:8.1f} s {result['rows_per_s']:8,} rows/s  {result['cpu_s']:.1f} CPU s  "
        f"peak {result['peak_mib']:,} MiB, "
        f"{result['started_mib']:,} MiB of it before the first row  {result['tokens']:,} tokens"
    )
    return result


def watch_memory(process: subprocess.Popen, peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], tree_memory(process.pid))
        time.sleep(0.3)


def tree_memory(pid: int) -> int:
    """Bytes of private and shared-out memory (PSS) of a process and its children, without mapped files."""
    import psutil

    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for process in processes:
        try:
            fields = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in fields if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


def run_side(arguments) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    started_mib = tree_memory(os.getpid()) >> 20
    side = with_prepare if arguments.side == "prepare" else with_datasets
    begin, cpu_begin = time.perf_counter(), sum(os.times()[:4])
    tokens = side(tokenizer, arguments)
    result = {"seconds": time.perf_counter() - begin, "cpu_s": sum(os.times()[:4]) - cpu_begin}
    print(json.dumps(result | {"tokens": tokens, "started_mib": started_mib}))


def with_prepare(tokenizer, arguments) -> int:
    from fitune.config.recipe import Data
    from fitune.data.prepare import prepare

    data = Data(dataset=arguments.input, prepared=arguments.output)
    options = {"max_length": arguments.max_length, "workers": arguments.workers}
    report = prepare(data, Path(arguments.output), tokenizer=tokenizer, **options)
    return report["tokens"]["total"] + report["test_tokens"]


def with_datasets(tokenizer, arguments) -> int:
    import datasets

    from fitune.data.chat_template import apply_chat_template_choice
    from fitune.data.conversations import LLAMA3_CONTROL_TOKENS

    datasets.disable_progress_bars()
    apply_chat_template_choice(tokenizer, "llama3")
    rows = datasets.load_dataset("json", data_files=arguments.input, split="train")
    rows = rows.map(
        one_row, fn_kwargs={"tokenizer": tokenizer, "control": LLAMA3_CONTROL_TOKENS}, num_proc=arguments.workers
    )
    seen = set()
    first = [number for number, row_hash in enumerate(rows["hash"]) if not (row_hash in seen or seen.add(row_hash))]
    rows = rows.select(first)
    split = rows.train_test_split(test_size=0.05, seed=42)
    for name, part in split.items():
        part.select_columns(["messages"]).to_json(f"{arguments.output}/{name}.jsonl", num_proc=arguments.workers)
    return sum(rows["length"])


def one_row(row: dict, tokenizer, control) -> dict:
    """The same checks as prepare makes for a row of this shape."""
    import hashlib

    messages = row["messages"]
    for number, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[number % 2] or not message["content"].strip():
            raise ValueError("roles out of order, or empty")
        if control.search(message["content"]):
            raise ValueError("control token")
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return {
        "input_ids": encoded["input_ids"],
        "assistant_masks": encoded["assistant_masks"],
        "length": len(encoded["input_ids"]),
        "trained": sum(encoded["assistant_masks"]),
        "hash": hashlib.blake2b(json.dumps(messages).encode(), digest_size=16).digest(),
    }


if __name__ == "__main__":
    main()
