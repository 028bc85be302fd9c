"""A real Slurm on this machine: a controller and two nodes, n1 and n2, in a mount namespace of their own.

Needs Linux, root, and Debian's packages slurm-wlm and munge: apt install slurm-wlm. Each node is a slurmd in a UTS
namespace that bears its name; both names lead to 127.0.0.1 by an /etc/hosts that only these processes see.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun", "unshare")
IN_NAMESPACE = "FITUNE_SLURM_NAMESPACE"

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "BOOT_FAIL", "NODE_FAIL")

CONFIG = """\
ClusterName=fitune
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
KillWait=60
InactiveLimit=0
MinJobAge=300
SchedulerParameters=requeue_setup_env_fail
{nodes}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no such cluster here; None if there can."""
    programs = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if programs:
        return f"{', '.join(programs)} missing: apt install slurm-wlm"
    return None if os.geteuid() == 0 else "needs root, for namespaces"


def enter_namespace() -> None:
    """Starts this program again where /etc/hosts can be another one, unless it runs there already."""
    if IN_NAMESPACE not in os.environ:
        environment = os.environ | {IN_NAMESPACE: "1"}
        os.execvpe("unshare", ["unshare", "--mount", sys.executable, *sys.argv], environment)


class Cluster:
    """As a context manager: running in `folder`, gone afterwards."""

    def __init__(self, folder: Path):
        self.folder, self.processes = folder, {}
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }  # fmt: skip

    def __enter__(self):
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname()
        hosts = self.folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
        subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)
        nodes = "\n".join(
            f"NodeName={node} NodeAddr=127.0.0.1 Port={_free_port()} CPUs=1 RealMemory=9000 State=UNKNOWN"
            for node in NODES
        )
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(host=host, controller=_free_port(), folder=self.folder, nodes=nodes)
        )
        self.processes["controller"] = self._start("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait_for(lambda: self.command("sinfo", "-h", "-o", "%D %T").strip() == "2 idle", "both nodes are idle")
        return self

    def __exit__(self, *_):
        self.command("scancel", "--user=root")
        for node in NODES:
            self.kill_node(node)
        for pid in _descendants(self.processes["controller"].pid):
            _kill(pid)
        self.processes["controller"].wait()

    def start_node(self, node: str) -> None:
        self.processes[node] = self._start("unshare", "--uts", "sh", "-c", f"hostname {node} && exec slurmd -D")

    def kill_node(self, node: str) -> None:
        """Its slurmd and all that it started, at once: what bears its name. Steps are in sessions of their own."""
        for pid in _in_same_uts_namespace(self.processes[node].pid):
            _kill(pid)
        self.processes[node].wait()

    def begin_now(self, job: str) -> None:
        """A job that was requeued would rest for two minutes."""

        def is_pending() -> bool:
            state = self.job_state(job)
            assert state["JobState"] not in ENDED, f"job {job} is not requeued: {state}"
            return state["JobState"] == "PENDING"

        self.wait_for(is_pending, f"job {job} is requeued")
        time.sleep(2)  # slurmd tells a job's starts apart by whole seconds, and refuses one within the same
        self.command("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait_for_restart(self, job: str) -> None:
        self.wait_for(lambda: self.job_state(job).get("Restarts") == "1", "Slurm noticed that a node is gone")

    def command(self, *words: str) -> str:
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False).stdout

    def job_state(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        return dict(part.split("=", 1) for part in self.command("scontrol", "show", "job", job).split() if "=" in part)

    def wait_for(self, condition, what: str, seconds: float = 900) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"after {seconds} s not: {what}"
            time.sleep(0.5)

    def _start(self, *words: str) -> subprocess.Popen:
        log = (self.folder / "daemons.log").open("a")
        return subprocess.Popen(words, env=self.environment, stdout=log, stderr=log, start_new_session=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _in_same_uts_namespace(pid: int) -> list[int]:
    def namespace(process: str | int) -> str | None:
        try:
            return str(Path(f"/proc/{process}/ns/uts").readlink())
        except OSError:
            return None

    own = namespace(pid)
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if own and namespace(path.name) == own]


def _descendants(pid: int) -> list[int]:
    """A process and what it started, children first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found += _descendants(int(stat.parent.name))
    return [*found, pid]


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
