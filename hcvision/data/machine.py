"""What the machine has: cores, devices, a compiler, processes."""

import ctypes
import math
import os
import shutil
import sys
from pathlib import Path

import torch

QUOTA = Path("/sys/fs/cgroup/cpu.max")


def count_workers(wanted: int | None) -> int:
    """``wanted``, where None stands for the CPU cores available, at most 8."""
    return min(8, count_cores()) if wanted is None else wanted


def count_cores() -> int:
    """The CPU cores that this process may use, by its affinity and by the quota of its container (cgroup v2)."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file; "max" for no quota
        return cores


def keep_freed_memory() -> None:
    """Have glibc keep what it frees: a step on a CPU would get its tensors as fresh pages again and again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at the largest that it takes


def has_compiler(device: str) -> bool:
    """Whether there is the compiler that torch.compile needs: of C++ for a CPU, of C for starting kernels on a GPU."""
    usual = ("clang++" if sys.platform == "darwin" else "g++",) if device == "cpu" else ("gcc", "clang", "cc")
    chosen = os.environ.get("CXX" if device == "cpu" else "CC")
    return any(shutil.which(name) for name in ([chosen] if chosen else usual))


def pick_device(wanted: str = "auto") -> str:
    """``wanted``, where auto stands for a GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    name = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        known = ", ".join(["auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise ValueError(f"device must be one that works here, such as {known}, got {wanted!r}") from error
    return name


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU or the machine had too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_first_process() -> bool:
    """Whether this is the process that writes, also before Lightning has told the others what they are."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))
