"""What this computer has: which devices, how much memory, and how fast that memory is read.

    device = pick_device(None)                     # the accelerator, else the CPU
    need_memory(2 * 10**9, "the KV cache", "take fewer tokens")
    read_bandwidth(device)                         # bytes per second

drop_pages and use_huge_pages tell the system how the memory of a tensor is used.
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

READ_BYTES = 2**29  # that read_bandwidth reads at a time: more than any cache holds
MADV_DONTNEED, MADV_HUGEPAGE = 4, 14  # Linux's numbers for madvise


def pick_device(name: str | None) -> torch.device:
    """The device called name; for None this machine's accelerator, else its CPU. Raises UsageError if it is absent."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # fails where there is no such device, or one without memory, like meta
        if device.type != "cpu" and device.index is not None:
            torch.accelerator.set_device_index(device.index)  # PyTorch's measurements are of the current device
        return device
    except Exception:  # each backend has its own way to be absent
        here = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise UsageError(f"device {name!r} is not available here; this machine has: {here}") from None


def synchronize(device: torch.device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over 512 MiB reads, the best of five: no step can read its weights faster. Raises
    what lacks_memory knows if there is no room for so much."""
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
    """Bytes of main memory that this process can still take. Infinite where the system does not tell; it is Linux that
    kills a process without a word when it takes more."""
    free = [math.inf]
    with contextlib.suppress(OSError, ValueError):  # what is free in the machine, or holds nothing but copies of files
        words = Path("/proc/meminfo").read_text().split()  # MemAvailable: 123 kB SwapFree: 456 kB ...
        kilobytes = [int(words[words.index(name) + 1]) for name in ("MemAvailable:", "SwapFree:")]
        free.append(sum(kilobytes) * 1024)
    with contextlib.suppress(OSError, ValueError):  # a ValueError is what the word "max" gives: there is no limit
        free.append(free_in_container(Path("/sys/fs/cgroup")))
    with contextlib.suppress(OSError, ValueError):  # what `ulimit -v` leaves
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages_in_use = int(Path("/proc/self/statm").read_text().split()[0])
        if soft_limit != resource.RLIM_INFINITY:
            free.append(soft_limit - pages_in_use * mmap.PAGESIZE)
    return min(free)


def free_in_container(cgroup: Path) -> int:
    """Bytes that a container's limit leaves. Copies of files, such as a checkpoint just read, count as memory in use;
    those that have not been asked for lately, inactive_file, make room when it is needed."""
    limit = int((cgroup / "memory.max").read_text())
    in_use = int((cgroup / "memory.current").read_text())
    words = (cgroup / "memory.stat").read_text().split()  # anon 123 file 456 ...
    return limit - in_use + int(words[words.index("inactive_file") + 1])


def need_memory(n_bytes: int, what: str, oom_hint: str):
    """Raises UsageError, "what takes ...; oom_hint", if main memory cannot hold n_bytes more."""
    free = free_memory()
    if n_bytes > free:
        lack = f"{what} takes {n_bytes / 1e9:.2f} GB of memory, of which {free / 1e9:.2f} are free"
        raise UsageError(f"{lack}; {oom_hint}")


def lacks_memory(e: Exception) -> bool:
    """Whether e says that there is not enough memory; from PyTorch's allocators that is a RuntimeError."""
    if isinstance(e, RuntimeError):
        return re.search("out of memory|allocate memory|bad_alloc", str(e)) is not None
    return isinstance(e, MemoryError)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had at a time: of a GPU's memory in tensors, else of main memory."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).max_memory_allocated()
    with contextlib.suppress(OSError, ValueError):  # Linux, where a child's ru_maxrss begins with its parent's
        words = Path("/proc/self/status").read_text().split()
        return int(words[words.index("VmHWM:") + 1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def drop_pages(t: Tensor):
    """Lets go of the memory of t, which must lie in a memory-mapped file. Pages of files that have been read count as
    memory in use; if they are needed again, they are read again."""
    madvise(t, MADV_DONTNEED)


def use_huge_pages(t: Tensor):
    """Asks for pages of 2 MB in place of 4 KB under t, to which nothing has been written yet. Looking up where each
    small page lies would cost a fifth of the bandwidth."""
    madvise(t, MADV_HUGEPAGE)


def madvise(t: Tensor, advice: int):
    """Linux's madvise for the pages that lie wholly in t; elsewhere nothing."""
    start = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # rounded up
    end = (t.data_ptr() + t.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE  # rounded down
    if sys.platform == "linux" and end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
