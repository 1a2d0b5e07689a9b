"""The C library's allocation of memory for tensors on a CPU."""

import ctypes
import platform


def reuse_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones.

    By default it gives every large block back to the kernel, and a training step on the CPU spends
    more time on fresh pages than on arithmetic.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)
