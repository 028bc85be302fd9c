"""Python programs that start at once: forks of a process that has imported torch and the other libraries.

A program does what it would do otherwise. It has its own arguments, environment, folder, session and output, imports
fitune by itself, and reads a sitecustomize.py on its PYTHONPATH. Ranks are forks of their launcher, so they are its
children. `ps` shows both as if Python had started them. What happens while Python imports libraries is not seen.
"""

import array
import atexit
import ctypes
import functools
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

WORD = 8
"Bytes of a number in what server and clients tell each other."


def warm_context():
    """Of multiprocessing: its processes are forks of one that has imported `tests/warm_up.py`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm_up"])
    return context


class Child:
    """A process: what subprocess.Popen says of one. Of a child of this process; `Program` is that of the server."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._look()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self) -> int | None:
        found, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if found else None


def run(arguments: list, environment: dict[str, str], folder: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` to its end, and what it printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with Path(os.devnull).open() as nothing:
            program = Program(arguments, environment, folder, (nothing.fileno(), out.fileno(), err.fileno()))
        code = program.wait(timeout)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


class Program(Child):
    """`python ARGUMENTS` in `folder`, in a session of its own, with `streams` as stdin, stdout and stderr."""

    def __init__(self, arguments: list, environment: dict[str, str], folder: Path, streams: tuple[int, int, int]):
        words = json.dumps([list(map(str, arguments)), environment, str(folder)]).encode()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(_server())
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))]
        self._server.sendmsg([len(words).to_bytes(WORD, "big")], rights)
        self._server.sendall(words)
        self.pid = self._number()
        self._server.setblocking(False)

    def _look(self) -> int | None:
        with suppress(BlockingIOError):
            return self._number()
        return None

    def _number(self) -> int:
        word = self._server.recv(WORD)
        assert word, "the server of programs is gone"
        return int.from_bytes(word, "big", signed=True)


def rank(args: tuple[str, ...], env: dict[str, str], stdout=None, stderr=None, **_) -> Program:
    """What torch's launcher starts with Popen, where that runs in this process."""
    streams = (0, stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2)
    return Program(list(args[1:]), env, Path.cwd(), streams)


@functools.cache
def _server() -> str:
    """The address of this process's server of programs, which ends with it."""
    folder = tempfile.TemporaryDirectory(prefix="fitune-python-")
    atexit.register(folder.cleanup)
    address = str(Path(folder.name) / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        server = warm_context().Process(target=_serve, args=(listening,))
        server.start()
    atexit.register(server.kill)
    return address


def _serve(listening: socket.socket) -> None:
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)  # the parent ends with the process of the tests
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who answers a client reaps its program by itself
    start = _Start()
    while True:
        client, _ = listening.accept()
        with client:
            if os.fork() == 0:
                listening.close()
                _answer(client, start)


def _answer(client: socket.socket, start: "_Start") -> None:
    """Starts the client's program, tells its pid and its exit code, and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, control, _, _ = client.recvmsg(WORD, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    streams = array.array("i", control[0][2])
    words = b""
    while len(words) < int.from_bytes(size, "big"):
        words += client.recv(2**20)
    child = Child()
    child.pid = os.fork()
    if child.pid == 0:
        start.program(*json.loads(words), streams)
    with suppress(ConnectionError):  # nobody may be left to hear it
        client.sendall(child.pid.to_bytes(WORD, "big", signed=True))
        client.sendall(child.wait().to_bytes(WORD, "big", signed=True))
    os._exit(0)


class _Start:
    """Makes a fork of this process, or of a fork, what a new Python would be. Made in the server."""

    def __init__(self):
        self.open_files = _open_files()
        self.finders = list(sys.meta_path)
        tests = Path(__file__).parent
        of_this = {tests.parent, *tests.rglob("*"), tests}
        self.path = [path for path in sys.path if path and Path(path) not in of_this]
        self.forgotten = []

    def program(self, arguments: list[str], environment: dict[str, str], folder: str, streams) -> None:
        """In a process that was just forked: runs `python ARGUMENTS`, and never returns."""
        gc.freeze()  # nobody who may still use a file is asked to close it
        atexit._clear()  # what the launcher removes when it ends, its temporary folders, is not a rank's to remove
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for number, name in ((1, "stdout"), (2, "stderr")):
            by_lines = name == "stderr" or "-u" in arguments or os.isatty(number)
            setattr(sys, name, os.fdopen(number, "w", 1 if by_lines else -1, closefd=False))
        for file in _open_files() - self.open_files:
            with suppress(OSError):
                os.close(file)
        os.setsid()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        _show_in_ps(arguments, environment)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        arguments = [word for word in arguments if word != "-u"]
        is_module = arguments[0] == "-m"
        self._forget(folder if is_module else str(Path(folder, arguments[0]).parent))
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess_handler.Popen = functools.partial(Rank, self)
        sys.argv = arguments[is_module:]
        os._exit(_exit_code(is_module))

    def _forget(self, folder: str) -> None:
        """What Python has not imported when it starts, and what changed that."""
        sys.meta_path[:] = self.finders
        sys.path[:] = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *self.path]
        names = [name for name in sys.modules if name.split(".")[0] in ("fitune", "sitecustomize")]
        self.forgotten += [sys.modules.pop(name) for name in names]
        importlib.invalidate_caches()
        with suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")


class Rank(Child):
    """The same where the launcher is a program: a fork of it."""

    def __init__(self, start: _Start, args, env, stdout=None, stderr=None, **_):
        self.pid = os.fork()
        if self.pid == 0:
            streams = [0, stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2]
            start.program(list(args[1:]), env, str(Path.cwd()), streams)


def _exit_code(is_module: bool) -> int:
    code = 0
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _open_files() -> set[int]:
    return {int(file.name) for file in Path("/proc/self/fd").iterdir()}


def _show_in_ps(arguments: list[str], environment: dict[str, str]) -> None:
    """Writes both where the kernel shows them (proc(5): cmdline, environ), as far as there is room: RANK first.

    The room is as long as the environment of the server, which can be short.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    arg_start, arg_end, env_start, env_end = map(int, fields[45:49])
    names = sorted(environment, key=lambda name: (name != "RANK", name in INITIAL_ENVIRONMENT))
    variables = [f"{name}={environment[name]}" for name in names]
    for words, start, end in ((["python", *arguments], arg_start, arg_end), (variables, env_start, env_end)):
        text = b"\0".join(map(os.fsencode, words))[: end - start - 1]
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, text, len(text))


INITIAL_ENVIRONMENT = frozenset(os.environ)
"What stood there before; the room goes to new variables first."
