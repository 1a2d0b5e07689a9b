"""Threads and memory of the CPU loops: how neurons are distributed, and who computes them.

Threads are torch's own OpenMP team where that is GNU's, as on Linux: its members spin for work
after each of torch's operators, and other threads would wait for their cores. Elsewhere, and in a
forked child, which has no team, they are this module's own, over kernels that release the GIL.
numba's thread pools abort when two Python threads enter them, or break in a forked child.

The pieces of the work, here of 2 samples of channels a, b and c of ``inner`` = 3 neurons::

    step    aaabbbccc aaabbbccc   all neurons at one time, in the order of memory
    part    000000001 111111122   what a thread takes, for all steps: one of ``ranges`` of neurons
    part    000000111 000000111   or, with ``whole``, all neurons of a ``group`` of channels
    run     ------    ------      neighbours in memory of part 0: with ``whole`` one in each sample
    block   ---       ---         what of a run goes through all steps while it is in the cache
    row     the values of a block at one step
"""

from __future__ import annotations

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import PROCESS
from ..text import Layout
from . import loops

#: floats of a block's rows, which stay in the second-level cache
SCRATCH = 24 * 1024
#: neurons per block at least, for long sequences
BLOCK = 64
#: element-steps that are worth a thread
GRAIN = 1 << 15
#: bytes of a huge page; a tensor of twice as many is worth some, and has one wherever it begins
HUGE = 1 << 21
#: parts, at most: a parameter's gradient is summed in each, then over them
PARTS = 64
#: floats of a run of ``whole`` at least
RUN = 320
#: values of a part of ``whole`` at most
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


def partition(
    layout: Layout, steps: int, neurons: int, inner: int, channels: int, whole: bool = False
) -> dict[str, int]:
    """How the work is cut, by the shape alone: members of :class:`.loops.Arguments`.

    There are no ranges where there is no work. With ``whole`` a thread has ``room`` for the
    gradient of a part.
    """
    inner = inner if channels > 1 else max(neurons, 1)
    rows = layout.first_state + 2 + (layout.states + 1) * steps
    block = min(max(SCRATCH // rows, BLOCK), loops.ROW) // 64 * 64
    group, room = max(channels, 1), 0
    part_size = block * max(1, -(-neurons // (block * PARTS)))
    ranges = -(-neurons // part_size)
    if whole:
        group, ranges = group_size(channels, inner), 1
        part_size = neurons // channels * group
        # An odd number of cache lines: else all rows would compete for the same sets of the cache.
        room = part_size // 32 * 32 + 48
        run = inner * group if group < channels else neurons
        block = -(-run // -(-run // block))  # even ones
    return {
        "parts": max(ranges * -(-channels // group), 1),
        "ranges": ranges,
        "part_size": part_size,
        "block": block,
        "room": room,
        "group": group,
        "whole": whole,
        "sums_size": ((layout.totals + 2) * ranges + 1) * channels,
        "scratch_size": loops.scratch_size(layout, steps, room),
        "steps": steps,
        "neurons": neurons,
        "inner": inner,
        "channels": channels,
    }


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
        self,
        kernel: Any,
        places: tuple[int, ...],
        about: tuple[tuple[bool, ...], tuple[bool, ...], Tensor | None] = ((), (), None),
        *passes: dict[str, float],
        **options: Any,
    ) -> None:
        """``places`` are those of the tensors in ``Arguments.at``; ``passes`` differ in options.

        ``about``: which operands and totals are per channel, and the constants of a program.
        """
        operand_channels, total_channels, constants = about
        self.function, self.places = _function(kernel), places
        self.passes = [loops.Arguments(**options | more) for more in passes or ({},)]
        self.blank = [0] * (loops.ADDRESSES + 1)  # the last for a tensor that goes nowhere
        if constants is not None:
            self.blank[loops.CONSTANTS] = constants.data_ptr()
        for arguments in self.passes:
            arguments.operand_channels[: len(operand_channels)] = operand_channels
            arguments.total_channels[: len(total_channels)] = total_channels
        self.sums_size, self.scratch_size = options["sums_size"], options["scratch_size"]
        grains = options["steps"] * options["neurons"] // GRAIN
        self.threads = max(1, min(options["parts"], grains))

    def __call__(self, v_init: Any, *tensors: Tensor | None) -> None:
        """Run it on as many threads as torch may use and the work is worth."""
        threads = min(torch.get_num_threads(), self.threads)
        size = 2 * self.sums_size + threads * self.scratch_size
        scratch = torch.empty(size, dtype=torch.float32, device="cpu")
        addresses = self.blank.copy()
        for place, tensor in zip(self.places, tensors, strict=True):
            if tensor is not None:
                addresses[place] = tensor.data_ptr()
        for arguments in self.passes:
            record = loops.Arguments.from_buffer_copy(arguments)
            record.scratch = scratch.data_ptr()
            record.v_init[: len(v_init)] = v_init
            record.at[:] = addresses[:-1]
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


#: the system call of that name, on Linux, where it knows of huge pages
_MADVISE: Any = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None


def ask_for_huge_pages(*tensors: Tensor | None) -> None:
    """Let the system back large new tensors, and what reuses their memory, by huge pages."""
    for tensor in tensors if _MADVISE else ():
        if tensor is not None:
            first = -(-tensor.data_ptr() // HUGE) * HUGE
            size = (tensor.data_ptr() + tensor.nbytes) // HUGE * HUGE - first
            _MADVISE(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
