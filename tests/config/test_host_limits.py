"""RAM and cores as containers, Kubernetes and Slurm limit them: fake trees of /proc and /sys/fs/cgroup."""

import os
from pathlib import Path

import pytest

from fitune.config.host_limits import GIB, host_memory_gib, usable_cores

MEMINFO = f"MemTotal:       {128 * 2**20} kB\nMemFree:         1 kB\nMemAvailable:   {100 * 2**20} kB\n"


def tree(root: Path, groups: str, files: dict[str, object]) -> Path:
    """A root folder with /proc/meminfo of 128 GiB, /proc/self/cgroup and files below /sys/fs/cgroup."""
    content = {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups}
    content |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n", encoding="utf-8")
    return root


def test_a_machine_without_limits(tmp_path):
    root = tree(tmp_path, "0::/user.slice", {"user.slice/memory.max": "max", "user.slice/cpu.max": "max 100000"})
    assert host_memory_gib(root) == (128, 100)
    assert usable_cores(root) == len(os.sched_getaffinity(0))


def test_docker_with_version_2(tmp_path):
    root = tree(tmp_path, "0::/", {
        "memory.max": 32 * GIB, "memory.current": 10 * GIB, "memory.stat": f"anon 1\ninactive_file {4 * GIB}",
        "cpu.max": "100000 100000",
    })  # fmt: skip
    assert host_memory_gib(root) == (32, 26)  # 6 of the 10 GiB are in use, 4 are cache
    assert usable_cores(root) == 1


def test_the_smallest_limit_on_the_way_up_counts(tmp_path):
    job = "system.slice/slurmstepd.scope/job_7"
    root = tree(tmp_path, f"0::/{job}/step_0/task_0", {
        f"{job}/memory.max": 64 * GIB, f"{job}/memory.current": 60 * GIB,
        f"{job}/step_0/memory.max": "max", f"{job}/step_0/task_0/memory.max": 80 * GIB,
        f"{job}/step_0/task_0/memory.current": GIB,
    })  # fmt: skip
    assert host_memory_gib(root) == (64, 4)


def test_version_1_as_kubernetes_mounts_it(tmp_path):
    groups = "5:cpu,cpuacct:/kubepods/pod1/abc\n4:memory:/kubepods/pod1/abc\n1:name=systemd:/x"
    root = tree(tmp_path, groups, {  # in the container the group's own folder is the mount
        "memory/memory.limit_in_bytes": 16 * GIB, "memory/memory.usage_in_bytes": 3 * GIB,
        "memory/memory.stat": f"total_inactive_file {GIB}", "cpu,cpuacct/cpu.cfs_quota_us": 150000,
        "cpu,cpuacct/cpu.cfs_period_us": 100000,
    })  # fmt: skip
    assert host_memory_gib(root) == (16, 14)
    assert usable_cores(root) == 1


@pytest.mark.parametrize("limit", [9223372036854771712, "max"])
def test_a_huge_number_is_no_limit(limit, tmp_path):
    files = {"memory/memory.limit_in_bytes": limit, "memory/memory.usage_in_bytes": 3 * GIB}
    assert host_memory_gib(tree(tmp_path, "4:memory:/", files)) == (128, 100)


def test_quotas_round_down_but_never_to_none(tmp_path):
    assert usable_cores(tree(tmp_path, "0::/", {"cpu.max": "50000 100000"})) == 1
    assert usable_cores(tree(tmp_path, "0::/", {"cpu.max": "1000000 1000"})) == len(os.sched_getaffinity(0))


def test_a_system_without_proc_still_answers(tmp_path):
    total, available = host_memory_gib(tmp_path)
    assert total == available > 0 and usable_cores(tmp_path) >= 1
