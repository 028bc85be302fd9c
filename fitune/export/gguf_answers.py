"""What llama.cpp holds likeliest after some beginnings: a process of its own, since llama.cpp's threads never end.

    python -m fitune.export.gguf_answers FILE < [[token ids], ...] > [[[token id, log-probability], ...], ...]

The answer is the last line. The exit code is 1 where there is none, and the last line of stderr says why.
"""

import json
import math
import os
import subprocess
import sys
import traceback
from pathlib import Path

from fitune.config.shipped import python_path
from fitune.errors import FituneError
from fitune.export.llama_cpp import Post, leave, likeliest_tokens, start_llama_cpp

LIKELIEST = 20
"Tokens that are asked for after each beginning."
LONGEST = 256
"Tokens of a beginning, at most: llama.cpp's least context."
Answers = list[list[tuple[int, float]]]
"Of each beginning: tokens and their log-probabilities, the likeliest first."


def ask_gguf(file: Path, beginnings: list[list[int]]) -> Answers:
    """Token ids in, answers out. FituneError where llama.cpp cannot load the file or fails."""
    command = [sys.executable, "-m", "fitune.export.gguf_answers", str(file)]
    environment = os.environ | python_path()
    done = subprocess.run(command, input=json.dumps(beginnings), capture_output=True, text=True, env=environment)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = said[-1] if said else f"llama.cpp ended with exit code {done.returncode}"
        raise FituneError(f"the check of {file.name} failed: {why}; --no-check skips it")
    return [
        [(token, probability) for token, probability in answer] for answer in json.loads(done.stdout.splitlines()[-1])
    ]


def likeliest(beginnings: list[list[int]], post: Post) -> Answers:
    return [
        [(token["id"], _number(token["logprob"])) for token in likeliest_tokens(post, beginning, LIKELIEST)]
        for beginning in beginnings
    ]


def _number(value: float | None) -> float:
    """JSON has none that is not a number."""
    return math.nan if value is None else value


def main() -> None:
    try:
        answers = likeliest(json.load(sys.stdin), start_llama_cpp(Path(sys.argv[1]), LONGEST, on_cpu=True))
        print(f"\n{json.dumps(answers)}", flush=True)
    except FituneError as error:
        print(f"\n{error}", file=sys.stderr, flush=True)
        leave(1)
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave()


if __name__ == "__main__":
    main()
