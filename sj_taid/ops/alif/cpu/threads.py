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
from ..plan import Norm
from . import loops

#: floats of a block's rows, which stay in the second-level cache
SCRATCH = 24 * 1024
#: neurons per block at least, for long sequences
BLOCK = 64
#: element-steps that are worth a thread
GRAIN = 1 << 15
#: bytes from which a tensor is worth huge pages, and the size of one
HUGE = 1 << 21
#: parts of the work, at most: a parameter's gradient is summed in each, then over them
PARTS = 64
#: neighbouring floats that a part has at least of each sample, where it is all of some channels
RUN = 320
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


# A forked child inherits the pool but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


class Partition(NamedTuple):
    """How the work is distributed, a function of the shape alone.

    Each group of ``group`` channels is cut into ``ranges`` parts, none where there is no work. With
    ``whole`` a part is a whole group, and a thread has room for its gradient.
    """

    parts: int
    ranges: int
    part_size: int
    block: int
    room: int
    group: int
    whole: bool
    sums_size: int
    scratch_size: int
    steps: int
    neurons: int
    inner: int
    channels: int

    @classmethod
    def of_neurons(
        cls, steps: int, neurons: int, inner: int, channels: int, whole: bool = False
    ) -> Partition:
        """Parts of a step's neurons, for all steps."""
        inner = inner if channels > 1 else max(neurons, 1)
        block = min(max(SCRATCH // (18 + 2 * steps), BLOCK), loops.ROW) // 64 * 64
        group, room = max(channels, 1), 0
        part_size = block * max(1, -(-neurons // (block * PARTS)))
        if whole:
            group = group_size(channels, inner)
            part_size = neurons // channels * group
            room = _pad(part_size)
            run = inner * group if group < channels else neurons
            block = -(-run // -(-run // block))  # even pieces of a run
        ranges = 1 if whole else -(-neurons // part_size)
        return cls(
            parts=max(ranges * -(-channels // group), 1),
            ranges=ranges,
            part_size=part_size,
            block=block,
            room=room,
            group=group,
            whole=whole,
            sums_size=(loops.SUMS * ranges + 1) * channels,
            scratch_size=loops.scratch_size(steps, room),
            steps=steps,
            neurons=neurons,
            inner=inner,
            channels=channels,
        )


def _pad(size: int) -> int:
    """An odd number of cache lines: otherwise all rows would compete for the same cache sets."""
    return size // 32 * 32 + 48


def group_size(channels: int, inner: int) -> int:
    """Channels per part, where a part holds whole channels."""
    return min(channels, -(-RUN // inner))


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _function(kernel: Any) -> Any:
    return _FUNCTION(loops.compile_function(kernel).address)


class Call:
    """A kernel, and what of its arguments is known in advance: all but addresses."""

    def __init__(
        self, kernel: Any, partition: Partition, *passes: dict[str, float], **options: Any
    ):
        self.function = _function(kernel)
        self.scratch_size, self.sums_size = partition.scratch_size, partition.sums_size
        self.threads = max(1, min(partition.parts, partition.steps * partition.neurons // GRAIN))
        arguments = partition._asdict() | options
        self.passes = [loops.Arguments(**arguments | more) for more in passes or ({},)]

    def __call__(
        self, v_init: float = 0.0, norm: Norm | None = None, **tensors: Tensor | None
    ) -> None:
        """Run it on as many threads as torch may use and the work is worth."""
        if norm is not None:
            tensors.update(zip(norm._fields, norm, strict=True))
        threads = min(torch.get_num_threads(), self.threads)
        size = 2 * self.sums_size + threads * self.scratch_size
        scratch = torch.empty(size, dtype=torch.float32, device="cpu")
        for arguments in self.passes:
            record = loops.Arguments.from_buffer_copy(arguments)
            record.scratch, record.v_init = scratch.data_ptr(), v_init
            for name, tensor in tensors.items():
                if tensor is not None:
                    setattr(record, name, tensor.data_ptr())
            address = ctypes.addressof(record)
            if threads == 1:
                self.function(address)
            elif os.getpid() == PROCESS and (gomp := _gomp()):
                gomp.GOMP_parallel(self.function, ctypes.c_void_p(address), threads, 0)
            else:
                others = [_pool().submit(self.function, address) for _ in range(threads - 1)]
                self.function(address)
                for other in others:
                    other.result()


@cache
def _madvise() -> Any:
    """The system call of that name, on Linux, where it knows of huge pages."""
    return ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None


def ask_for_huge_pages(*tensors: Tensor | None) -> None:
    """Let the system back large new tensors, and what reuses their memory, by huge pages."""
    for tensor in tensors:
        # Twice the size, so that one huge page lies within wherever the tensor begins.
        if tensor is not None and tensor.nbytes >= 2 * HUGE and (madvise := _madvise()):
            first = -(-tensor.data_ptr() // HUGE) * HUGE
            last = (tensor.data_ptr() + tensor.nbytes) // HUGE * HUGE
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)
