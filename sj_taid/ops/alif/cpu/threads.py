"""The loops' threads and memory: how the neurons are shared out, and who works on them.

Threads are torch's own OpenMP team where that is GNU's, as on Linux: after each of torch's
operators its members spin for the next piece of work, and other threads would have to wait for
their cores. Elsewhere, and in a forked child, where the team is gone, they are this module's own
over kernels that release the GIL: numba's thread pools either abort the process when two Python
threads enter them or break in a forked child.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import backends

#: floats of scratch memory a thread: a block's rows stay in the second-level cache
SCRATCH = 24 * 1024
#: neurons a block, at least (long sequences) and at most
BLOCK = (64, 4096)
#: element-steps that are worth a thread: two threads break even with one at twice as many
GRAIN = 1 << 19
#: bytes from which a tensor is worth huge pages, and the size of one
HUGE = 1 << 21
#: shares of the work, at most: a parameter's gradient is summed in each, then over them
PARTS = 64


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sj_taid")


@cache
def _gomp() -> Any:
    """GNU's OpenMP, if torch brings it along, as its wheels for Linux do."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ctypes.CDLL(str(libraries[0])) if libraries else None


_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# A forked child inherits the pool but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


class Partition(NamedTuple):
    """How the neurons are shared out: a function of the shape alone.

    ``rows`` of a block are what a kernel needs of scratch memory; ``counted`` of them decide how
    long they are.
    """

    parts: int
    part_size: int
    block: int
    scratch: int
    work: int

    @classmethod
    @cache
    def of(cls, steps: int, neurons: int, rows: int, counted: int) -> Partition:
        # An odd number of cache lines, or all rows would compete for the same cache sets.
        block = min(max(SCRATCH // counted, BLOCK[0]), BLOCK[1]) // 32 * 32 + 16
        part_size = block * max(1, -(-neurons // (block * PARTS)))
        parts = -(-neurons // part_size)
        return cls(parts, part_size, block, rows * block, steps * neurons)


def run(kernel: Callable[..., None], shape: Partition, *arguments: Any) -> None:
    """Call the kernel for all parts, on as many threads as torch may use and the work is worth."""
    threads = max(1, min(torch.get_num_threads(), shape.parts, shape.work // GRAIN))
    scratch = torch.empty(threads * shape.scratch, dtype=torch.float32, device="cpu")

    def share(k: int) -> tuple[Any, ...]:
        first, last = shape.parts * k // threads, shape.parts * (k + 1) // threads
        own = scratch.data_ptr() + k * shape.scratch * scratch.itemsize
        return own, first, last, shape.part_size, shape.block, *arguments

    shares = iter(range(threads))
    errors = []

    def work(_: Any = None) -> None:
        try:
            for k in shares:
                kernel(*share(k))
        except BaseException as error:  # raised below: it cannot pass through C
            errors.append(error)

    _together(work, threads)
    if errors:
        raise errors[0]


def _together(work: Callable[..., None], threads: int) -> None:
    """Call ``work`` on ``threads`` threads at once."""
    if threads == 1:
        work()
    elif os.getpid() == backends.PROCESS and (gomp := _gomp()):
        gomp.GOMP_parallel(_MEMBER(work), None, threads, 0)
    else:
        others = [_pool().submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()


@cache
def _madvise() -> Any:
    """The system call of that name, where it knows of huge pages: on Linux."""
    return ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None


def ask_for_huge_pages(*tensors: Tensor) -> None:
    """Let the system back large new tensors, and what takes their place later, by huge pages."""
    for tensor in tensors:
        # So large that one lies within, wherever it begins.
        if tensor.nbytes >= 2 * HUGE and (madvise := _madvise()):
            first = -(-tensor.data_ptr() // HUGE) * HUGE
            last = (tensor.data_ptr() + tensor.nbytes) // HUGE * HUGE
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)
