"""Starts Python programs by forking a process that has imported torch and the rest once: seconds less for each.

A program does what it would do otherwise: it has its own arguments, environment, working folder and output.
`FITUNE`'s launcher starts its ranks in the same way, because torch asks the variable PYTHON_EXEC what Python is.
"""

import array
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

IMPORTED = ("fitune.training.trainer", "accelerate.commands.launch", "matplotlib.backends.backend_agg", "click", "rich")
CLIENT = """#!{python} -IS
import array, json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    words = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    streams = array.array("i", [0, 1, 2])
    server.sendmsg([len(words).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    server.sendall(words)
    sys.exit(int(server.recv(16) or b"70"))
"""


class QuickPython:
    """A with-block in which `executable` is such a Python. It takes `-u`, `-m MODULE …` and `FILE.py …`."""

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="fitune-python-")
        address = str(Path(self.folder.name) / "socket")
        self.executable = str(Path(self.folder.name) / "python")
        Path(self.executable).write_text(CLIENT.format(python=sys.executable, address=address))
        Path(self.executable).chmod(0o700)
        self.server = subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE)
        assert self.server.stdout.readline() == b"ready\n"
        return self

    def __exit__(self, *_):
        self.server.kill()
        self.server.wait()
        self.folder.cleanup()


def serve(address: str) -> None:
    for module in IMPORTED:
        __import__(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who answers a client reaps its program by itself
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            with client:
                if os.fork() == 0:
                    server.close()
                    _answer(client)


def _answer(client: socket.socket) -> None:
    """Runs the client's program in a process of its own, tells the exit code and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, control, _, _ = client.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    streams = array.array("i", control[0][2])
    words = b""
    while len(words) < int.from_bytes(size, "big"):
        words += client.recv(2**20)
    program = os.fork()
    if program == 0:
        client.close()
        _run(*json.loads(words), streams)
    _, status = os.waitpid(program, 0)
    client.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())
    os._exit(0)


def _run(arguments: list[str], environment: dict[str, str], folder: str, streams) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    code = 1
    try:
        arguments = [word for word in arguments if word != "-u"]
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    serve(sys.argv[1])
