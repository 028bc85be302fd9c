"""What is larger than a card, asked on cards of given sizes: how it was held, how long it took, what it said.

    python benchmarks/asked.py RESULT.json FOLDER ... --cards 1x48 2x32 1x12 --work FOLDER --seconds 400 [--eval ROWS]

`--gpus 2,3` takes others of the machine's GPUs than the first; `--what chat` asks in one way only.

Each question goes through `cli.py generate` (three prompts, ten tokens, greedily), each chat through `--chat`, each
measurement through `cli.py eval`. The machine's GPUs are held to the card: torch by a cap, `plan` by a stand-in for
nvidia-smi. Answers of one folder are compared with one another: random weights have many near ties, so where they part
is told, not judged. A base without a chat template only goes on with the prompts as texts.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from found import smaller_cards
from tier_run import ROOT, about, torch_gib

from fitune.environment import GPU_CAP
from fitune.export.tokenizer_files import template_of

PROMPTS = ("What is the capital of France?", "Name three colours.", "Why is the sky blue?")
TOKENS = "10"
WAYS = ("generate", "chat", "eval")
SHORTEST_SECONDS = 40
"What starting and reading 40 GB takes at least."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("folders", type=Path, nargs="+", help="of models or runs")
    parser.add_argument("--cards", nargs="+", required=True, metavar="GPUSxGIB")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="Nothing begins that would not end in time.")
    parser.add_argument("--eval", type=Path, metavar="ROWS", help="Also measure on a folder that prepare wrote.")
    parser.add_argument("--what", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--gpus", default="0,1,2,3", help="as many of the first as cards are asked for are taken")
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    ends, runs = time.monotonic() + options.seconds, []
    options.work.mkdir(parents=True, exist_ok=True)
    head = about(options.commit) | {"benchmark": "larger than a card, asked", "command": " ".join(sys.argv)}
    for folder in options.folders:
        for cards in options.cards:
            for what in _ways(folder, options):
                left = ends - time.monotonic()
                if left < SHORTEST_SECONDS:
                    raise SystemExit(f"{folder.name}, {cards}, {what}: no time is left")
                runs.append(_asked(folder, cards, what, left, options))
                print({key: value for key, value in runs[-1].items() if key != "answers"}, flush=True)
                options.result.write_text(json.dumps(head | {"runs": runs}, indent=1, ensure_ascii=False) + "\n")
    for folder in options.folders:
        _compare([run for run in runs if run["folder"] == folder.name and run.get("answers")])


def _ways(folder: Path, options: argparse.Namespace) -> list[str]:
    possible = ["generate", *(["chat"] + ["eval"] * bool(options.eval) if _answers_chats(folder) else [])]
    return [way for way in possible if way in options.what]


def _answers_chats(folder: Path) -> bool:
    return (folder / "run.yaml").is_file() or bool(template_of(folder))


def _asked(folder: Path, cards: str, what: str, seconds: float, options: argparse.Namespace) -> dict:
    count, gib = cards.split("x")
    environment = os.environ | smaller_cards(options.work / f"cards-{gib}", float(gib))
    environment |= {
        "CUDA_VISIBLE_DEVICES": ",".join(options.gpus.split(",")[: int(count)]),
        GPU_CAP: str(torch_gib(float(gib))),
    }
    answers = options.work / f"{folder.name}-{cards}.json"
    answers.unlink(missing_ok=True)
    words = {
        "generate": ["generate", folder, *_questions(folder), "--json", answers],
        "chat": ["generate", folder, "--chat"],
        "eval": ["eval", folder, "--data", options.eval],
    }[what]
    words += ["--max-new-tokens", TOKENS] * (what != "eval")
    typed, began = f"{PROMPTS[0]}\n/exit\n" * (what == "chat"), time.monotonic()
    result = {"folder": folder.name, "cards": cards, "what": what}
    try:
        done = subprocess.run([sys.executable, "cli.py", *map(str, words)], cwd=ROOT, env=environment, input=typed,
                              capture_output=True, text=True, timeout=seconds)  # fmt: skip
    except subprocess.TimeoutExpired:
        return result | {"error": f"cut after {seconds:.0f} s"}
    result["seconds"] = round(time.monotonic() - began)
    result["held"] = [line for line in done.stderr.splitlines() if " GiB of " in line]
    if done.returncode:
        return result | {"error": done.stderr[-1000:]}
    if what == "generate":
        return result | {"answers": json.loads(answers.read_text(encoding="utf-8"))}
    return result | {"printed": done.stdout[-1500:]}


def _questions(folder: Path) -> list[str]:
    flag = "--prompt" if _answers_chats(folder) else "--text"
    return [word for prompt in PROMPTS for word in (flag, prompt)]


def _compare(runs: list[dict]) -> None:
    for run in runs[1:]:
        for first, other in zip(runs[0]["answers"], run["answers"], strict=True):
            for who in first.keys() - {"messages", "text", "tools"}:
                same = "the same" if first[who] == other[who] else f"{first[who]!r} and {other[who]!r}"
                print(f"{run['folder']}, {runs[0]['cards']} and {run['cards']}, {who}: {same}")


if __name__ == "__main__":
    main()
