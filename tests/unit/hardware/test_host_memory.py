"""Free and total memory of a host, of files as the kernel shows them to machines and containers."""

import os

import pytest

from megatron_irl import hardware
from megatron_irl.hardware import host_memory

GIB = 1024**3
V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "")
V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
NO_LIMIT = {V2: "max", V1: "9223372036854771712"}  # as each of them says it
PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def machine(root, available, cgroup=""):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       99999999 kB\nMemFree:  1 kB\nMemAvailable:   {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def group(root, version, path, limit, used=0, inactive=0, active=0):
    mount, *names, prefix = version
    folder = root / mount / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    # A v1 group's plain lines are of its own processes, those of all below begin with ``total_``.
    (folder / "memory.stat").write_text(
        f"anon 7\ninactive_file 1\nactive_file 3\nfile 9\n{prefix}inactive_anon 11\n"
        f"{prefix}inactive_file {inactive}\n{prefix}active_file {active}\n")


@pytest.mark.parametrize(("version", "lines"), [
    (V2, "0::/slurm/job_7/step_0\n"),
    (V1, "5:devices:/\n4:cpu,memory:/slurm/job_7/step_0\n0::/elsewhere\n"),
])
def test_the_least_of_the_machine_and_every_group_above(tmp_path, version, lines):
    root = machine(tmp_path, 100 * GIB, lines)
    assert host_memory.free(root) == 100 * GIB, "no group has files"
    group(root, version, "slurm/job_7/step_0", NO_LIMIT[version], 5 * GIB)
    group(root, version, "slurm", NO_LIMIT[version], 5 * GIB)
    assert host_memory.free(root) == 100 * GIB and host_memory.total(root) == PHYSICAL
    group(root, version, "slurm/job_8", 1 * GIB)
    assert host_memory.free(root) == 100 * GIB, "another's limit"
    group(root, version, "slurm/job_7", 3 * GIB, 2 * GIB, inactive=GIB // 2)
    assert host_memory.free(root) == 1.5 * GIB, "what files are cached in is given back"
    group(root, version, "slurm/job_7", 3 * GIB, 3 * GIB, inactive=GIB // 2, active=GIB)
    assert host_memory.free(root) == 1.5 * GIB, "also of files that were read twice"
    assert host_memory.total(root) == min(PHYSICAL, 3 * GIB)
    group(root, version, "slurm/job_7/step_0", 1 * GIB, 3 * GIB // 4)
    assert host_memory.free(root) == GIB // 4
    group(root, version, "slurm/job_7/step_0", 1 * GIB, 2 * GIB)
    assert host_memory.free(root) == 0, "over its limit, it has nothing left and no less"


@pytest.mark.parametrize("version", [V2, V1])
def test_a_container_told_a_path_that_it_does_not_have(tmp_path, version):
    line = "0::/docker/abc\n" if version is V2 else "9:memory:/docker/abc\n"
    root = machine(tmp_path, 8 * GIB, line)
    group(root, version, "", 4 * GIB, 1 * GIB)
    assert host_memory.free(root) == 3 * GIB
    (root / "proc/meminfo").write_text(f"MemAvailable: {2 * GIB // 1024} kB\n")
    assert host_memory.free(root) == 2 * GIB, "the machine has less than the limit"


def test_without_any_of_these_files(tmp_path):
    assert host_memory.free(tmp_path) == host_memory.total(tmp_path) == PHYSICAL
    root = machine(tmp_path, GIB, "0::/\n")
    group(root, V2, "", 5)
    (root / "sys/fs/cgroup/memory.current").unlink()
    (root / "sys/fs/cgroup/memory.stat").write_text("not a table")
    assert host_memory.free(root) == 5


@pytest.mark.skipif(hardware.IS_CUDA, reason="the device's memory counts where there is one")
def test_ranks_of_a_host_share_what_is_free(monkeypatch):
    monkeypatch.setattr(host_memory, "free", lambda: 12 * GIB)
    monkeypatch.setattr(host_memory, "total", lambda: 16 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert hardware.free_memory() == 3 * GIB
    assert hardware.device_memory(0, 2) == 8 * GIB
