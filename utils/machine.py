"""Describes the machine: the devices, the memory's bandwidth and free bytes, and how many threads may run.

    device = pick_device(None)                     # the accelerator, or the CPU if there is none
    check_memory(2 * 10**9, "the KV cache")        # raises OutOfMemoryError
    measure_read_bandwidth(device)                 # bytes per second
    limit_threads()                                # no more threads than CPUs that this process may use

drop_pages and use_huge_pages tell the operating system how a tensor's memory will be used.
"""

import contextlib
import ctypes
import math
import mmap
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import OutOfMemoryError, UsageError

READ_BYTES = 2**29  # measure_read_bandwidth reads this much at a time: more than a processor's caches hold
UNKNOWN_CACHE_BYTES = 2**28  # the assumed size of all caches if the system reports none
CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
PROCESS_CGROUPS = Path("/proc/self/cgroup")
# In a control group's folder: the file with the limit, the file with the usage, and the line of memory.stat that counts
# the bytes Linux can drop
MEMORY_FILES = [
    ("memory.max", "memory.current", "inactive_file"),  # version 2 of control groups
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # environment variables that PyTorch reads
MADV_DONTNEED, MADV_HUGEPAGE = 4, 14  # the numbers in Linux's headers


def pick_device(name: str | None) -> torch.device:
    """Returns the device called name. None means the accelerator, or the CPU if there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # fails if the device is missing or, like "meta", has no memory
        if device.type != "cpu" and device.index is not None:
            torch.accelerator.set_device_index(device.index)  # synchronize and peak_memory use the current device
        return device
    except Exception:  # every backend raises a type of its own
        available = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise UsageError(f"device {name!r} is not available here; this machine has: {available}") from None


def synchronize(device: torch.device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


# ---- Bandwidth ------------------------------------------------------------------------------------------------------


def measure_read_bandwidth(device: torch.device) -> float:
    """Returns the bytes per second at which a sum over 512 MiB reads memory, the best of five runs. Raises MemoryError
    or RuntimeError if there is no room (see is_out_of_memory)."""
    if device.type == "cpu" and free_memory() < READ_BYTES:
        raise MemoryError
    return sum_bandwidth([torch.ones(READ_BYTES // 8, dtype=torch.int64, device=device)])


def measure_read_bandwidth_on(tensors: Iterable[Tensor]) -> float | None:
    """Measures a CPU's read bandwidth on the first few tensors, and so needs no new memory. Returns None if all tensors
    together are less than twice as large as the processor's caches: then the sums would be too fast."""
    cached, n_bytes, chosen = cache_bytes(), 0, []
    for tensor in tensors:
        if n_bytes >= max(2 * cached, READ_BYTES // 2):
            break
        chosen.append(tensor)
        n_bytes += tensor.nbytes
    return sum_bandwidth(merge_adjacent(chosen)) if chosen and n_bytes >= 2 * cached else None


def sum_bandwidth(tensors: list[Tensor]) -> float:
    """tensors: int64. Returns the bytes per second of the best of five runs."""
    seconds = []
    for _ in range(5):
        synchronize(tensors[0].device)
        began = time.perf_counter()
        for tensor in tensors:
            tensor.sum()
        synchronize(tensors[0].device)
        seconds.append(time.perf_counter() - began)
    return sum(tensor.nbytes for tensor in tensors) / min(seconds)


def merge_adjacent(tensors: list[Tensor]) -> list[Tensor]:
    """Returns the memory of CPU tensors as int64 tensors. Neighbours in memory become one tensor, because calling the
    sum of a small tensor takes longer than the sum itself."""
    spans: list[list[int]] = []  # [start, end) of each, in bytes
    for start, end in sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors):
        if spans and start - spans[-1][1] < mmap.PAGESIZE:  # so short a gap lies in the tensors' own pages: readable
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([start, end])
    arrays = [(ctypes.c_int64 * ((end - start) // 8)).from_address(start) for start, end in spans]
    return [torch.frombuffer(array, dtype=torch.int64) for array in arrays if len(array)]


def cache_bytes() -> int:
    """Returns the bytes of all last-level caches together."""
    for level in ("index3", "index2"):
        sizes = {}  # the list of CPUs that share a cache -> the size of that cache
        with contextlib.suppress(OSError, ValueError):
            for folder in CPUS.glob(f"cpu[0-9]*/cache/{level}"):
                kilobytes = (folder / "size").read_text().strip().removesuffix("K")
                sizes[(folder / "shared_cpu_list").read_text()] = int(kilobytes) * 1024
            if sizes:
                return sum(sizes.values())
    return UNKNOWN_CACHE_BYTES


# ---- Memory ---------------------------------------------------------------------------------------------------------


def free_memory() -> float:
    """Returns the bytes of main memory that this process can still allocate: the minimum over the machine, the control
    groups and `ulimit -v`. Linux kills a process that takes more, without a message. Returns infinity if the system
    reports nothing."""
    free = [math.inf]
    with contextlib.suppress(OSError, ValueError):  # the machine: free pages, pages that cache files, and swap
        words = Path("/proc/meminfo").read_text().split()  # MemAvailable: 123 kB SwapFree: 456 kB ...
        kilobytes = [int(words[words.index(name) + 1]) for name in ("MemAvailable:", "SwapFree:")]
        free.append(sum(kilobytes) * 1024)
    for folder in cgroup_folders("memory"):
        free.append(free_in_cgroup(folder))
    with contextlib.suppress(OSError, ValueError):  # `ulimit -v`
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages_in_use = int(Path("/proc/self/statm").read_text().split()[0])
        if soft_limit != resource.RLIM_INFINITY:
            free.append(soft_limit - pages_in_use * mmap.PAGESIZE)
    return min(free)


def free_in_cgroup(folder: Path) -> float:
    """Returns the bytes that a control group's limit leaves, or infinity without a limit.

    Linux counts pages that cache files, such as a checkpoint just read, as memory in use. Pages that were not used
    lately (inactive_file) count as free here, because Linux drops them when memory runs short."""
    for limit_file, usage_file, inactive in MEMORY_FILES:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is "max", which means no limit
            limit = int((folder / limit_file).read_text())
            in_use = int((folder / usage_file).read_text())
            words = (folder / "memory.stat").read_text().split()  # anon 123 file 456 ...
            return limit - in_use + int(words[words.index(inactive) + 1])
    return math.inf


def cgroup_folders(controller: str) -> list[Path]:
    """Returns the folders of this process's control groups (a container is one) and of their parents, whose limits
    apply as well. controller: "memory" or "cpu"."""
    folders = []
    with contextlib.suppress(OSError, ValueError):
        for line in PROCESS_CGROUPS.read_text().splitlines():  # version 2: "0::/a/b"; version 1: "4:memory:/a/b"
            _, controllers, group = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = CGROUPS / controller if controllers else CGROUPS
            folder = root / group.strip("/")  # in a container, perhaps only root exists
            folders += [f for f in (folder, *folder.parents) if f.is_relative_to(root)]
    return folders


def check_memory(n_bytes: int, what: str):
    """Raises OutOfMemoryError if main memory has no room for n_bytes. what: what needs them, for the message."""
    free = free_memory()
    if n_bytes > free:
        needed, available = n_bytes / 1e9, free / 1e9
        raise OutOfMemoryError(f"{what} takes {needed:.2f} GB of memory, of which {available:.2f} are free")


def is_out_of_memory(e: Exception) -> bool:
    """Whether e means that memory ran out. PyTorch's allocators raise RuntimeError for that."""
    if isinstance(e, RuntimeError):
        return re.search("out of memory|allocate memory|bad_alloc", str(e)) is not None
    return isinstance(e, MemoryError)


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory of this process in bytes: of tensors on a GPU, otherwise of main memory."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).max_memory_allocated()
    with contextlib.suppress(OSError, ValueError):  # not ru_maxrss: in a child process it starts at the parent's
        words = Path("/proc/self/status").read_text().split()
        return int(words[words.index("VmHWM:") + 1]) * 1024
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit


def drop_pages(t: Tensor):
    """Releases the pages of t, which must lie in a memory-mapped file. They no longer count as memory in use. The next
    access reads them from the file again."""
    madvise(t, MADV_DONTNEED)


def use_huge_pages(t: Tensor):
    """Asks for pages of 2 MB instead of 4 KB for t. Call it before anything is written to t. With 4 KB, translating
    addresses costs a fifth of the bandwidth."""
    madvise(t, MADV_HUGEPAGE)


def madvise(t: Tensor, advice: int):
    """Calls madvise for the pages that lie entirely within t. Does nothing on systems other than Linux."""
    start = math.ceil(t.data_ptr() / mmap.PAGESIZE) * mmap.PAGESIZE
    end = (t.data_ptr() + t.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE  # rounded down
    if sys.platform == "linux" and end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


# ---- Threads --------------------------------------------------------------------------------------------------------


def limit_threads():
    """Makes PyTorch use at most allowed_threads(). By default PyTorch starts a thread for each physical core, whatever
    a container's quota is. Does nothing if the user has set one of THREAD_VARIABLES."""
    if not any(os.environ.get(name) for name in THREAD_VARIABLES):
        n_threads = min(torch.get_num_threads(), allowed_threads())
        if n_threads < torch.get_num_threads():
            torch.set_num_threads(n_threads)


def allowed_threads() -> int:
    """Returns how many CPUs this process may use at a time: the CPUs of the affinity mask, within the control groups'
    quotas. A quota is rounded down. With one thread more, Linux would suspend a thread for part of every period while
    all other threads wait for it."""
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(map(cpu_quota, cgroup_folders("cpu")), default=math.inf)
    return max(1, int(min(n_cpus, quota)))


def cpu_quota(folder: Path) -> float:
    """Returns how many CPUs a control group may keep busy on average; infinity means no limit."""
    with contextlib.suppress(OSError, ValueError):  # version 2: "150000 100000"; "max 100000" means no limit
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):  # version 1: -1 means no limit
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else math.inf
    return math.inf
