"""`machine.py NETWORK NAME HOSTS MODEL PATH python PROGRAM …` runs a program of Python as on a machine of its own.

It has the network namespace NETWORK, the host's name NAME and the file HOSTS as /etc/hosts; where MODEL is given, PATH
leads to it. So have the processes that it starts. Needs root.
"""

import ctypes
import runpy
import socket
import subprocess
import sys
from pathlib import Path

NEW_MOUNTS, NEW_NAME, NEW_NETWORK = 0x00020000, 0x04000000, 0x40000000
"CLONE_NEWNS, CLONE_NEWUTS and CLONE_NEWNET (Linux, sched.h)."


def enter(network: str, name: str, hosts: str, model: str, path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", network).open() as namespace:
        _check(libc.setns(namespace.fileno(), NEW_NETWORK))
    _check(libc.unshare(NEW_MOUNTS | NEW_NAME))
    socket.sethostname(name)
    _mount("--make-rprivate", "/")
    _mount("--bind", hosts, "/etc/hosts")
    if model:
        _mount("--bind", model, path)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def _check(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), "namespace")


enter(*sys.argv[1:6])
sys.argv = sys.argv[7:]
sys.path[0] = str(Path.cwd())
runpy.run_path(sys.argv[0], run_name="__main__")
