"""Threads and memory of the CPU loops: how neurons are distributed, and who computes them.

Threads are torch's own OpenMP team where that is GNU's, as on Linux: its members spin for work
after each of torch's operators, and other threads would wait for their cores. Elsewhere, and in a
forked child, which has no team, they are this module's own, over kernels that release the GIL.
numba's thread pools abort when two Python threads enter them, or break in a forked child.
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

from ... import PROCESS

#: floats of scratch memory per thread: a block's rows stay in the second-level cache
SCRATCH = 24 * 1024
#: neurons per block, at least (long sequences) and at most
BLOCK = (64, 4096)
#: element-steps that are worth a thread: two threads break even with one at twice as many
GRAIN = 1 << 19
#: bytes from which a tensor is worth huge pages, and the size of one
HUGE = 1 << 21
#: parts of the work, at most: a parameter's gradient is summed in each, then over them
PARTS = 64


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sj_taid")


@cache
def _gomp() -> Any:
    """GNU's OpenMP if torch ships it, as its wheels for Linux do."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ctypes.CDLL(str(libraries[0])) if libraries else None


_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# A forked child inherits the pool but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


class Partition(NamedTuple):
    """How the neurons are distributed, a function of the shape alone.

    A block needs ``rows`` of scratch memory; ``counted`` of them decide how long they are.
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
    turns = iter(range(threads))
    errors = []

    def work(_: Any = None) -> None:
        try:
            for k in turns:
                first, last = shape.parts * k // threads, shape.parts * (k + 1) // threads
                own = scratch.data_ptr() + k * shape.scratch * scratch.itemsize
                kernel(own, first, last, shape.part_size, shape.block, *arguments)
        except BaseException as error:  # raised below: it cannot pass through C
            errors.append(error)

    if threads == 1:
        work()
    elif os.getpid() == PROCESS and (gomp := _gomp()):
        gomp.GOMP_parallel(_MEMBER(work), None, threads, 0)
    else:
        others = [_pool().submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()
    if errors:
        raise errors[0]


@cache
def _madvise() -> Any:
    """The system call of that name, on Linux, where it knows of huge pages."""
    return ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None


def ask_for_huge_pages(*tensors: Tensor) -> None:
    """Let the system back large new tensors, and what reuses their memory, by huge pages."""
    for tensor in tensors:
        # Twice the size, so that one huge page lies within wherever the tensor begins.
        if tensor.nbytes >= 2 * HUGE and (madvise := _madvise()):
            first = -(-tensor.data_ptr() // HUGE) * HUGE
            last = (tensor.data_ptr() + tensor.nbytes) // HUGE * HUGE
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)
