"""The machine: its devices, how much memory is free, and how fast that memory is read.

    device = pick_device(None)                     # the accelerator, or the CPU if there is none
    check_memory(2 * 10**9, "the KV cache", "take fewer tokens")
    read_bandwidth(device)                         # bytes per second

drop_pages and use_huge_pages tell the system how the memory of a tensor will be used.
"""

import contextlib
import ctypes
import math
import mmap
import re
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from config import UsageError

READ_BYTES = 2**29  # read by read_bandwidth at a time: more than any cache holds
MADV_DONTNEED, MADV_HUGEPAGE = 4, 14  # Linux's codes for madvise


def pick_device(name: str | None) -> torch.device:
    """The device called name. None: the accelerator, or the CPU if there is none. Raises UsageError if the machine has
    no such device."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # fails if the device is missing, or has no memory, like meta
        if device.type != "cpu" and device.index is not None:
            torch.accelerator.set_device_index(device.index)  # PyTorch measures the current device
        return device
    except Exception:  # each backend raises its own type
        here = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise UsageError(f"device {name!r} is not available here; this machine has: {here}") from None


def synchronize(device: torch.device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second at which a sum over 512 MiB reads memory, the best of five. A step cannot read its weights
    faster. Raises MemoryError or RuntimeError (see lacks_memory) if there is no room for 512 MiB."""
    if device.type == "cpu" and free_memory() < READ_BYTES:
        raise MemoryError
    x = torch.ones(READ_BYTES // 4, device=device)
    seconds = []
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        x.sum()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return x.nbytes / min(seconds)


def free_memory() -> float:
    """Bytes of main memory that this process can still allocate: the least of three limits. Infinite if the system does
    not report any. Linux kills a process that takes more, without a message."""
    free = [math.inf]
    with contextlib.suppress(OSError, ValueError):  # the machine: free pages, cached copies of files, and swap
        words = Path("/proc/meminfo").read_text().split()  # MemAvailable: 123 kB SwapFree: 456 kB ...
        kilobytes = [int(words[words.index(name) + 1]) for name in ("MemAvailable:", "SwapFree:")]
        free.append(sum(kilobytes) * 1024)
    with contextlib.suppress(OSError, ValueError):  # the container; ValueError: its limit is "max", which means none
        free.append(free_in_container(Path("/sys/fs/cgroup")))
    with contextlib.suppress(OSError, ValueError):  # the process: what `ulimit -v` leaves
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages_in_use = int(Path("/proc/self/statm").read_text().split()[0])
        if soft_limit != resource.RLIM_INFINITY:
            free.append(soft_limit - pages_in_use * mmap.PAGESIZE)
    return min(free)


def free_in_container(cgroup: Path) -> int:
    """Bytes that a container's limit leaves. Cached copies of files, such as a checkpoint just read, count as memory in
    use. The ones not used lately (inactive_file) are dropped when memory is needed, so here they count as free."""
    limit = int((cgroup / "memory.max").read_text())
    in_use = int((cgroup / "memory.current").read_text())
    words = (cgroup / "memory.stat").read_text().split()  # anon 123 file 456 ...
    return limit - in_use + int(words[words.index("inactive_file") + 1])


def check_memory(n_bytes: int, what: str, oom_hint: str):
    """Raises UsageError if main memory has no room for n_bytes. Its message names what needs them, and ends with
    oom_hint, which says what would help."""
    free = free_memory()
    if n_bytes > free:
        lack = f"{what} takes {n_bytes / 1e9:.2f} GB of memory, of which {free / 1e9:.2f} are free"
        raise UsageError(f"{lack}; {oom_hint}")


def lacks_memory(e: Exception) -> bool:
    """Whether e means that memory ran out. PyTorch's allocators raise RuntimeError for that."""
    if isinstance(e, RuntimeError):
        return re.search("out of memory|allocate memory|bad_alloc", str(e)) is not None
    return isinstance(e, MemoryError)


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has used at a time, in bytes. On a GPU: by tensors; else: main memory."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).max_memory_allocated()
    with contextlib.suppress(OSError, ValueError):  # on Linux a child's ru_maxrss starts at its parent's, so not that
        words = Path("/proc/self/status").read_text().split()
        return int(words[words.index("VmHWM:") + 1]) * 1024
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit


def drop_pages(t: Tensor):
    """Releases the pages of t, which must lie in a memory-mapped file; otherwise they count as memory in use. If they
    are needed again, the system reads them from the file again."""
    madvise(t, MADV_DONTNEED)


def use_huge_pages(t: Tensor):
    """Asks for pages of 2 MB instead of 4 KB for t, to which nothing has been written yet. Translating the addresses of
    small pages costs a fifth of the bandwidth."""
    madvise(t, MADV_HUGEPAGE)


def madvise(t: Tensor, advice: int):
    """Linux's madvise for the pages that lie completely in t. Does nothing on other systems."""
    start = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # rounded up
    end = (t.data_ptr() + t.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE  # rounded down
    if sys.platform == "linux" and end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
