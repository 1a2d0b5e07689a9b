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
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import PROCESS
from . import loops

#: floats of a block's rows, which stay in the second-level cache
SCRATCH = 24 * 1024
#: neurons per block, at least (long sequences) and at most
BLOCK = (64, 4096)
#: element-steps that are worth a thread
GRAIN = 1 << 15
#: bytes from which a tensor is worth huge pages, and the size of one
HUGE = 1 << 21
#: parts of the work, at most: a parameter's gradient is summed in each, then over them
PARTS = 64
#: neighbouring floats that a part has at least of each sample, where it is all of some channels
RUN = 128
#: values of such a part, at most
WHOLE = 1 << 17


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sj_taid")


@cache
def _gomp() -> Any:
    """GNU's OpenMP if torch ships it, as its wheels for Linux do."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ctypes.CDLL(str(libraries[0])) if libraries else None


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# A forked child inherits the pool but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


class Partition(NamedTuple):
    """How the neurons are distributed, a function of the shape alone.

    Each group of ``group`` channels is cut into ``ranges`` parts. With ``whole`` a part is a whole
    group, and a thread has room for its input and its gradient.
    """

    parts: int
    ranges: int
    part_size: int
    block: int
    pitch: int
    length: int
    group: int
    whole: bool
    scratch_size: int
    steps: int
    neurons: int
    inner: int
    channels: int

    @classmethod
    @cache
    def of(cls, steps: int, neurons: int, inner: int, channels: int, whole: bool) -> Partition:
        rows = loops.scratch_rows(steps)
        block = min(max(SCRATCH // (rows + steps), BLOCK[0]), BLOCK[1]) // 64 * 64
        if whole:
            group = group_size(channels, inner)
            part_size, ranges = neurons // channels * group, 1
            length = _pad(part_size)
        else:
            group, length = max(channels, 1), _pad(block)
            part_size = block * max(1, -(-neurons // (block * PARTS)))
            ranges = -(-neurons // part_size)
        parts = ranges * -(-channels // group)
        shape = steps, neurons, inner, channels
        pitch = _pad(block)
        scratch = rows * pitch + (1 + whole) * steps * length
        return cls(parts, ranges, part_size, block, pitch, length, group, whole, scratch, *shape)

    def sums(self, kinds: int) -> Tensor:
        """Room for sums over the neurons of each channel, zeros."""
        shape = self.ranges, kinds, self.channels
        return torch.zeros(shape, dtype=torch.float64, device="cpu")


@cache
def _sizes(partition: Partition) -> loops.Arguments:
    """The arguments that the partition decides."""
    return loops.Arguments(**partition._asdict())


def _pad(size: int) -> int:
    """An odd number of cache lines: otherwise all rows would compete for the same cache sets."""
    return size // 32 * 32 + 48


def group_size(channels: int, inner: int) -> int:
    """Channels per part, where a part holds whole channels."""
    return min(channels, -(-RUN // inner))


def run(kernel: Any, partition: Partition, **arguments: Tensor | float | None) -> None:
    """Call the kernel on as many threads as torch may use and the work is worth.

    The arguments are those of :class:`.loops.Arguments`; what is missing or ``None`` is 0.
    """
    work = partition.steps * partition.neurons
    threads = max(1, min(torch.get_num_threads(), partition.parts, work // GRAIN))
    counters = (ctypes.c_int64 * 2)()
    scratch = torch.empty(threads * partition.scratch_size, dtype=torch.float32, device="cpu")
    record = loops.Arguments.from_buffer_copy(_sizes(partition))
    record.counters, record.scratch = ctypes.addressof(counters), scratch.data_ptr()
    for name, value in arguments.items():
        if value is not None:
            setattr(record, name, value.data_ptr() if isinstance(value, Tensor) else value)
    address = ctypes.addressof(record)
    function = _FUNCTION(kernel.address)
    if threads == 1:
        function(address)
    elif os.getpid() == PROCESS and (gomp := _gomp()):
        gomp.GOMP_parallel(function, ctypes.c_void_p(address), threads, 0)
    else:
        others = [_pool().submit(function, address) for _ in range(threads - 1)]
        function(address)
        for other in others:
            other.result()


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
