"""How a rank's process ends: with its exit code, whatever gloo's threads still do."""

import subprocess
import sys

from patience import PATIENCE_SECONDS

from fitune.errors import CRASHED, STOPPED_BY_CTRL_C

RANKS = """
import atexit, ctypes
pause, usleep = ctypes.c_uint(0), ctypes.PyDLL(None).usleep  # PyDLL: Python is held meanwhile
usleep.argtypes = [ctypes.c_uint]
atexit.register(usleep, pause)  # the last before Python is taken apart, as it is the first here
import os, sys, time
import torch, torch.distributed as dist
from fitune.training.distributed import as_rank

def main():
    store = dist.FileStore(sys.argv[1], 2)
    dist.init_process_group("gloo", store=store, rank=int(is_second), world_size=2)
    sys.held = dist.group.WORLD  # as DTensor's caches do
    dist.barrier()
    tensor = torch.ones(4)
    if not is_second:
        time.sleep(1.0)
        dist.all_reduce(tensor)
        time.sleep(3.0)
        return
    tensor.name_of_python = "so that the thread that lets it go asks for Python"
    dist.all_reduce(tensor, async_op=True)
    del tensor
    pause.value = 2_500_000
    atexit.register(print, "what was registered")
    sys.exit(2)

is_second = not (first := os.fork())
if not is_second:
    main()
    print(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]))
else:
    as_rank(main)
"""


def test_a_thread_of_gloos_that_meets_the_end_of_python_does_not_abort_the_rank(tmp_path):
    """Ended as Python ends, by `main()` alone, the second rank dies of SIGABRT (torch 2.13)."""
    words = [sys.executable, "-c", RANKS, str(tmp_path / "store")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.stdout.splitlines() == ["what was registered", "2"], done.stderr
    assert "terminate called" not in done.stderr


ENDS = {
    "return": (0, ""),
    "sys.exit()": (0, ""),
    "sys.exit(75)": (75, ""),
    "sys.stdout.close()": (0, ""),
    "raise ValueError('nobody expected it')": (CRASHED, "ValueError: nobody expected it"),
    "raise KeyboardInterrupt": (STOPPED_BY_CTRL_C, "KeyboardInterrupt"),
}
EACH = """
import os, sys
from fitune.training.distributed import as_rank

class Held:
    def __del__(self):
        os.write(2, b"taken apart")

for number, end in enumerate(sys.argv[2:]):
    if not (child := os.fork()):
        file = os.open(f"{sys.argv[1]}/{number}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.held = Held()
        exec(f"def main():\\n print('the answer')\\n {end}")
        as_rank(main)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_every_end_keeps_its_code_and_what_was_printed_and_does_not_take_python_apart(tmp_path):
    words = [sys.executable, "-c", EACH, str(tmp_path), *ENDS]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    printed = [(tmp_path / str(number)).read_text().splitlines() for number in range(len(ENDS))]
    assert done.stdout.split() == [str(code) for code, _ in ENDS.values()], (done.stderr, printed)
    for lines, (_, said) in zip(printed, ENDS.values(), strict=True):
        assert "the answer" in lines and (not said or said in lines), lines
        assert not any("taken apart" in line for line in lines), lines
