"""Choice of the kernel for a call: its source, its specialisation, its grid of threads.

Nothing here needs a GPU or CuPy; ``cuda.py`` compiles and launches what this file chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..surrogate import DERIVATIVES

#: The C++ types of the kernels, by the input's dtype.
SCALARS = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}

BLOCK = 128  # threads per block
SEGMENT = 8  # steps per segment
LONGEST_SWEEP = 16  # steps without segments, in float32; half precision takes SEGMENT
SOFT, HARD, HARD_TO_ZERO = range(3)
NEED_X, NEED_W, NEED_V_THRESHOLD, NEED_NORM = 1, 2, 4, 8
_CONSTANTS = (
    *("BLOCK", "SEGMENT", "LONGEST_SWEEP", "SOFT", "HARD", "HARD_TO_ZERO"),
    *("NEED_X", "NEED_W", "NEED_V_THRESHOLD", "NEED_NORM"),
)

#: CuPy adds ``--ftz=true`` by itself: a voltage below 1.2e-38 is flushed to zero.
COMPILER_OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=true")

ALIGNMENT = 16  # bytes of the widest access

# Neurons per thread up to a number of steps, (float32, half): enough bytes requested at a time to
# keep memory busy, few enough registers for 4 to 6 blocks per multiprocessor.
_Vecs = tuple[tuple[float, tuple[int, int]], ...]
_FORWARD_VEC: _Vecs = ((2, (4, 8)), (math.inf, (4, 4)))
_NORM_FORWARD_VEC: _Vecs = ((math.inf, (4, 4)),)
_BACKWARD_VEC: _Vecs = (
    (1, (4, 8)),
    (2, (4, 4)),
    (4, (2, 4)),
    (LONGEST_SWEEP, (1, 2)),
    (math.inf, (2, 2)),
)
_NORM_BACKWARD_VEC: _Vecs = ((2, (4, 4)), (4, (2, 2)), (math.inf, (1, 2)))
STATISTICS_VEC = 4


def source() -> str:
    """``kernels.cu`` after the constants above, and a struct with each surrogate's derivative."""
    constants = (f"constexpr int {name} = {globals()[name]};\n" for name in _CONSTANTS)
    structs = (
        f"struct {derivative.name} {{ static __device__ __forceinline__ float derivative("
        f"float x, float a, float b) {{ {derivative.cuda} }} }};\n"
        for derivative in DERIVATIVES.values()
    )
    kernels = Path(__file__).with_name("kernels.cu").read_text()
    return "".join((*constants, '#line 1 "kernels.cu"\n', kernels, "\n", *structs))


def longest_sweep(dtype: torch.dtype) -> int:
    """The most steps that a thread holds in registers."""
    return LONGEST_SWEEP if dtype == torch.float32 else SEGMENT


def checkpoints(steps: int, dtype: torch.dtype) -> int:
    """How many voltages per neuron forward saves: at the start of each segment but the first.

    >>> [checkpoints(steps, torch.float32) for steps in (16, 17, 24, 25)]
    [0, 2, 2, 3]
    >>> [checkpoints(steps, torch.half) for steps in (8, 9, 16, 17)]
    [0, 1, 1, 2]
    """
    return 0 if steps <= longest_sweep(dtype) else (steps - 1) // SEGMENT


class Options(NamedTuple):
    """What a kernel is specialised for, apart from the number of neurons per thread."""

    dtype: torch.dtype
    steps: int
    v_reset: float | None
    decay_input: bool
    v_seq: bool
    norm: bool = False

    @property
    def template_steps(self) -> int:
        """``T`` of the template; beyond a single sweep only the rest after the segments counts.

        >>> [Options(torch.half, t, 0.0, True, False).template_steps for t in (8, 9, 16, 17)]
        [8, 17, 24, 17]
        """
        if self.steps <= longest_sweep(self.dtype):
            return self.steps
        return LONGEST_SWEEP + 1 + (self.steps - 1) % SEGMENT

    @property
    def reset(self) -> int:
        """``RESET`` of the template."""
        if self.v_reset is None:
            return SOFT
        return HARD if self.v_reset else HARD_TO_ZERO

    def forward_name(self, vec: int, lanes: int, pack: bool = False) -> str:
        """The C++ name of the forward kernel."""
        return f"alif_forward<{self._arguments(vec, lanes)},{int(pack)}>"

    def backward_name(
        self, vec: int, lanes: int, detach_reset: bool, needs: int, surrogate: str
    ) -> str:
        """The C++ name of the backward kernel."""
        arguments = self._arguments(vec, lanes)
        return f"alif_backward<{arguments},{int(detach_reset)},{needs},{surrogate}>"

    def forward_vec(self) -> int:
        """The most neurons per thread of the forward kernel."""
        return self._widest(_NORM_FORWARD_VEC if self.norm else _FORWARD_VEC)

    def backward_vec(self) -> int:
        """The most neurons per thread of the backward kernel without spilling registers."""
        return self._widest(_NORM_BACKWARD_VEC if self.norm else _BACKWARD_VEC)

    def _widest(self, table: _Vecs) -> int:
        # Voltages are float32 whatever the input is, and so are their gradients.
        column = 0 if self.dtype == torch.float32 or self.v_seq else 1
        return next(vecs for steps, vecs in table if self.steps <= steps)[column]

    def _arguments(self, vec: int, lanes: int) -> str:
        return (
            f"{SCALARS[self.dtype]},{self.template_steps},{vec},{lanes},{self.reset},"
            f"{int(self.decay_input)},{int(self.v_seq)},{int(self.norm)}"
        )


def statistics_name(dtype: torch.dtype, vec: int, lanes: int) -> str:
    """The C++ name of the kernel that computes a norm's statistics."""
    return f"channel_statistics<{SCALARS[dtype]},{vec},{lanes}>"


class Grid(NamedTuple):
    """How the neurons of one step are distributed over threads.

    Neuron ``i`` of a step, in storage order, has channel ``i / inner % channels``. A thread takes
    ``vec`` neighbours, then those ``vec * threads`` further, and so on; ``threads = rows * period``
    where the channels repeat after ``period`` packs of ``vec`` neurons. So a thread stays in its
    channel, or in its ``lanes = vec`` channels where neighbours have different channels.
    """

    size: int
    inner: int
    channels: int
    vec: int
    lanes: int
    rows: int
    period: int

    @property
    def threads(self) -> int:
        """Threads that work; the rest of the last block is idle."""
        return self.rows * self.period

    @property
    def blocks(self) -> int:
        """Blocks to launch."""
        return -(-self.threads // BLOCK)

    def reduce(self, partial: Tensor) -> Tensor:
        """Sum each channel of ``partial``, ``[sums, threads * lanes]``: one launch."""
        inner = 1 if self.lanes > 1 else self.period // self.channels
        return partial.view(len(partial), self.rows, self.channels, inner).sum((1, 3))


def grid(
    x_seq: Tensor,
    channels: int,
    vec: int,
    aligned: bool,
    capacity: int,
    resident: Callable[[int, int], int],
    steps: int = 1,
) -> Grid:
    """Distribute the neurons of ``x_seq`` ``[T, N, *]`` over threads.

    ``channels`` is 1 or ``x_seq``'s; ``vec`` the most neurons per thread, which is halved until
    packs divide a step and its channels evenly, and while too few threads would be left to fill
    the GPU; ``aligned`` whether all tensors start at a multiple of 16 bytes; ``capacity`` how many
    threads the GPU holds, ``resident(vec, lanes)`` how many of the kernel's; ``steps`` how many
    steps are taken as one.
    """
    size = x_seq[0].numel() * steps
    inner = x_seq.stride(2) if channels > 1 else 1
    while vec > 1 and not (
        aligned
        and size % vec == 0
        and (channels == 1 or inner % vec == 0 or (inner == 1 and channels % vec == 0))
        and size // vec >= capacity // 4
    ):
        vec //= 2
    lanes = vec if channels > 1 and inner == 1 else 1
    period = channels * inner // vec if channels > 1 else 1
    packs, threads = size // vec // period, resident(vec, lanes)
    # As many rows as run at a time; for long periods the number that ends soonest in a few turns.
    rows = min(
        (max(1, min(packs, turns * threads // period)) for turns in range(1, 5)),
        key=lambda rows: -(-rows * period // threads) * -(-packs // rows),
    )
    return Grid(size, inner, channels, vec, lanes, rows, period)


def resident_threads(registers: int, processors: int, threads_per_processor: int) -> int:
    """How many threads of a kernel the GPU runs at a time.

    A quarter of a multiprocessor has 16,384 registers, and gives a warp a multiple of 8 times 32.

    >>> [resident_threads(registers, 1, 2048) // BLOCK for registers in (32, 48, 82, 128, 255)]
    [16, 10, 5, 4, 2]
    """
    blocks = min(512 // (-(-registers // 8) * 8), threads_per_processor // BLOCK)
    return processors * blocks * BLOCK


def is_aligned(*tensors: Tensor | None) -> bool:
    """Whether every tensor given starts at a multiple of 16 bytes."""
    return all(t is None or t.data_ptr() % ALIGNMENT == 0 for t in tensors)
