"""utils/machine.py finds the limits of control groups, the number of threads, and the bandwidth of memory."""

import math
import os

import pytest
import torch

from cli import common_args
from cli.script import run_script
from utils import machine
from utils.errors import UsageError

# Files of a group whose limits are 600 bytes and 1.5 CPUs, and of one without limits
STAT = "anon 300\nfile 600\ninactive_anon 20\ninactive_file 500\nactive_file 100\ntotal_inactive_file 500\n"
V2 = {"memory.max": "1000", "memory.current": "900", "memory.stat": STAT, "cpu.max": "150000 100000"}
V2_FREE = {"memory.max": "max", "memory.current": "900", "memory.stat": STAT, "cpu.max": "max 100000"}
V1 = {
    "memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "900", "memory/memory.stat": STAT,
    "cpu/cpu.cfs_quota_us": "75000", "cpu/cpu.cfs_period_us": "50000",
}
V1_FREE = V1 | {"memory/memory.limit_in_bytes": str(2**63 - 4096), "cpu/cpu.cfs_quota_us": "-1"}


def write_group(root, files: dict[str, str], group: str):
    """Writes the files of a group below root. In version 1, each controller has a tree of its own."""
    for name, text in files.items():
        *controller, file = name.split("/")
        path = root.joinpath(*controller, group, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


@pytest.mark.parametrize("limited_group", ["", "a", "a/b"])
@pytest.mark.parametrize("files, free", [(V2, V2_FREE), (V1, V1_FREE)], ids=["version 2", "version 1"])
def test_limits_of_a_group_and_of_those_around_it(files, free, limited_group, tmp_path, monkeypatch):
    """The smallest limit of a group and its parents counts. A file in the page cache takes no memory. In a container
    the path of the group may not exist."""
    for group in ("", "a", "a/b"):
        write_group(tmp_path, files if group == limited_group else free, group)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    lines = "0::/a/b\n" if files is V2 else "12:cpu,cpuacct:/a/b\n4:memory:/a/b\n3:pids:/x\n0::/\n"
    (tmp_path / "cgroup").write_text(lines)
    monkeypatch.setattr(machine, "PROCESS_CGROUPS", tmp_path / "cgroup")
    assert min(map(machine.free_in_cgroup, machine.cgroup_folders("memory"))) == 600 == machine.free_memory()
    assert min(map(machine.cpu_quota, machine.cgroup_folders("cpu"))) == 1.5
    if limited_group == "":
        (tmp_path / "cgroup").write_text(lines.replace("/a/b", "/docker/1234").replace("0::/\n", "0::/../x\n"))
        assert machine.free_memory() == 600


def test_without_control_groups(tmp_path, monkeypatch):
    write_group(tmp_path, V2_FREE, "")
    assert machine.free_in_cgroup(tmp_path) == machine.cpu_quota(tmp_path) == math.inf
    monkeypatch.setattr(machine, "PROCESS_CGROUPS", tmp_path / "missing")
    assert machine.cgroup_folders("cpu") == [] and machine.allowed_threads() >= 1


@pytest.fixture
def two_threads(monkeypatch):
    """PyTorch has 2 threads during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for name in machine.THREAD_VARIABLES:
        monkeypatch.setenv(name, "")  # so monkeypatch restores the variable
        monkeypatch.delenv(name)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "quota, cpus, expected",
    [(math.inf, {0, 1}, 2), (8, {0, 1}, 2), (0.2, {0, 1}, 1), (1.9, {0, 1, 2, 3}, 1), (8, {5}, 1)],
)
def test_threads_are_those_that_may_run(quota, cpus, expected, monkeypatch, two_threads):
    monkeypatch.setattr(machine, "cpu_quota", lambda folder: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus)
    seen = []
    run_script(lambda: seen.append(torch.get_num_threads()))
    assert seen == [expected]


def test_the_users_number_of_threads_wins(monkeypatch, two_threads):
    monkeypatch.setattr(machine, "cpu_quota", lambda folder: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    machine.limit_threads()
    assert torch.get_num_threads() == 2
    common_args.set_threads(None)
    assert torch.get_num_threads() == 2
    common_args.set_threads(3)  # --threads counts more, also for child processes
    assert torch.get_num_threads() == 3 and os.environ["OMP_NUM_THREADS"] == "3"
    for wrong in (0, -1, 10**9):
        with pytest.raises(UsageError, match="--threads must be 1 to 1024"):
            common_args.set_threads(wrong)


def test_bandwidth_is_measured_in_memory_that_is_there(monkeypatch):
    """Adjacent tensors are read as one, and tensors that caches could hold are not read."""
    memory = torch.arange(2**16)
    parts = [memory[:1000], memory[40_000:], memory[1002:3000], memory[3000:3001].view(torch.int8)[:3]]
    joined = machine.merge_adjacent(parts)
    assert [len(t) for t in joined] == [3000, 2**16 - 40_000] and torch.equal(joined[0], memory[:3000])
    monkeypatch.setattr(machine, "cache_bytes", lambda: memory.nbytes // 2)
    assert machine.measure_read_bandwidth_on(memory.chunk(7)) > 0
    monkeypatch.setattr(machine, "cache_bytes", lambda: memory.nbytes // 2 + 1)
    assert machine.measure_read_bandwidth_on(memory.chunk(7)) is None and machine.measure_read_bandwidth_on([]) is None


def test_caches_of_all_parts_count(tmp_path, monkeypatch):
    for cpu, (shared, size) in enumerate([("0-1", "32768K"), ("0-1", "32768K"), ("2", "16384K")]):
        folder = tmp_path / f"cpu{cpu}/cache/index3"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
        (folder / "shared_cpu_list").write_text(f"{shared}\n")
    monkeypatch.setattr(machine, "CPUS", tmp_path)
    assert machine.cache_bytes() == 48 * 2**20
    monkeypatch.setattr(machine, "CPUS", tmp_path / "missing")
    assert machine.cache_bytes() == machine.UNKNOWN_CACHE_BYTES
