"""Which kernel runs a call, and how: the text, the specialisation, the threads.

Nothing here needs a GPU or CuPy; ``cuda.py`` compiles and launches what this file chooses.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..surrogate import DERIVATIVES

#: The C++ types of the kernels, by the input's dtype.
SCALARS = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}

BLOCK = 128  # threads a block
SEGMENT = 8  # steps of one
LONGEST_SWEEP = 16  # steps without segments
SOFT, HARD, HARD_TO_ZERO = range(3)
NEED_X, NEED_W, NEED_V_THRESHOLD = 1, 2, 4
_LENGTHS = ("BLOCK", "SEGMENT", "LONGEST_SWEEP")
_FLAGS = ("SOFT", "HARD", "HARD_TO_ZERO", "NEED_X", "NEED_W", "NEED_V_THRESHOLD")

ALIGNMENT = 16  # bytes of the widest access

# Neurons a thread by steps in registers: up to this many steps, (float32, half).
_FORWARD_VEC = ((2, (4, 8)), (LONGEST_SWEEP, (4, 4)))
_BACKWARD_VEC = ((2, (4, 8)), (4, (4, 4)), (8, (2, 4)), (LONGEST_SWEEP, (1, 2)))
_SEGMENTED_BACKWARD_VEC = (2, 2)


@cache
def source() -> str:
    """``kernels.cu`` after the constants above, and a struct with each surrogate's derivative."""
    constants = (f"constexpr int {name} = {globals()[name]};\n" for name in _LENGTHS + _FLAGS)
    structs = (
        f"struct {name} {{ static __device__ __forceinline__ float derivative("
        f"float x, float a, float b) {{ {derivative.cuda} }} }};\n"
        for name, derivative in DERIVATIVES.items()
    )
    kernels = Path(__file__).with_name("kernels.cu").read_text()
    return "".join((*constants, '#line 1 "kernels.cu"\n', kernels, "\n", *structs))


def checkpoints(steps: int) -> int:
    """How many voltages a neuron forward keeps: the one at the start of each segment but the first.

    >>> checkpoints(16), checkpoints(17), checkpoints(24), checkpoints(25)
    (0, 2, 2, 3)
    """
    return 0 if steps <= LONGEST_SWEEP else (steps - 1) // SEGMENT


class Options(NamedTuple):
    """What a kernel is specialised for, apart from the number of neurons a thread."""

    dtype: torch.dtype
    steps: int
    v_reset: float | None
    decay_input: bool
    v_seq: bool

    @property
    def template_steps(self) -> int:
        """``T`` of the template: beyond a single sweep only the rest after the segments counts.

        >>> [Options(torch.half, t, 0.0, True, False).template_steps for t in (16, 17, 24, 25)]
        [16, 17, 24, 17]
        """
        if self.steps <= LONGEST_SWEEP:
            return self.steps
        return LONGEST_SWEEP + 1 + (self.steps - 1) % SEGMENT

    @property
    def reset(self) -> int:
        """The ``Reset`` of the template."""
        if self.v_reset is None:
            return SOFT
        return HARD if self.v_reset else HARD_TO_ZERO

    def forward_name(self, vec: int, lanes: int) -> str:
        """The C++ name of the forward kernel."""
        return f"alif_forward<{self._arguments(vec, lanes)}>"

    def backward_name(
        self, vec: int, lanes: int, detach_reset: bool, needs: int, surrogate: str
    ) -> str:
        """The C++ name of the backward kernel."""
        arguments = self._arguments(vec, lanes)
        return f"alif_backward<{arguments},{int(detach_reset)},{needs},{surrogate}>"

    def forward_vec(self) -> int:
        """Most neurons a thread of the forward kernel takes."""
        return self._widest(_FORWARD_VEC, _FORWARD_VEC[-1][1])

    def backward_vec(self) -> int:
        """Most neurons a thread of the backward kernel takes without spilling registers."""
        return self._widest(_BACKWARD_VEC, _SEGMENTED_BACKWARD_VEC)

    def _widest(
        self, table: tuple[tuple[int, tuple[int, int]], ...], beyond: tuple[int, int]
    ) -> int:
        # Voltages are float32 whatever the input is, and so are their gradients.
        column = 0 if self.dtype == torch.float32 or self.v_seq else 1
        return next((vecs for steps, vecs in table if self.steps <= steps), beyond)[column]

    def _arguments(self, vec: int, lanes: int) -> str:
        return (
            f"{SCALARS[self.dtype]},{self.template_steps},{vec},{lanes},{self.reset},"
            f"{int(self.decay_input)},{int(self.v_seq)}"
        )


class Grid(NamedTuple):
    """How the neurons of one step are dealt to threads.

    Neuron ``i`` of a step, in storage order, has channel ``i / inner % channels``. A thread takes
    ``vec`` neighbours, then those ``vec * threads`` further, and so on; ``threads = rows * period``
    where ``period`` packs of ``vec`` neurons bring the same channels again. So a thread stays in
    its channel, or in its ``lanes = vec`` channels where neighbours are of different channels.
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
        """Threads that work; the rest of the last block has nothing to do."""
        return self.rows * self.period

    @property
    def blocks(self) -> int:
        """Blocks to launch."""
        return -(-self.threads // BLOCK)

    def reduce(self, partial: Tensor, shape: torch.Size) -> Tensor:
        """Sum each channel of ``partial``, ``[parameters, threads * lanes]``: one launch."""
        inner = 1 if self.lanes > 1 else self.period // self.channels
        sums = partial.view(len(partial), self.rows, self.channels, inner).sum((1, 3))
        return sums.view(-1, *shape)


def grid(x_seq: Tensor, parameter: Tensor, vec: int, aligned: bool, capacity: int) -> Grid:
    """Deal the neurons of ``x_seq`` ``[T, N, *]`` to threads.

    ``parameter`` is a scalar or ``[C]``; ``vec`` the most neurons a thread may take, which is
    halved until packs divide a step and its channels evenly, and while too few threads would be
    left to fill the GPU; ``aligned`` whether all tensors start at a multiple of 16 bytes;
    ``capacity`` how many threads the GPU holds.
    """
    size = x_seq[0].numel()
    channels = parameter.numel()
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
    rows = max(1, min(size // vec // period, capacity // period))
    return Grid(size, inner, channels, vec, lanes, rows, period)


def is_aligned(*tensors: Tensor | None) -> bool:
    """Whether 16-byte accesses may start at the beginning of every tensor given."""
    return all(t is None or t.data_ptr() % ALIGNMENT == 0 for t in tensors)


def traffic(options: Options) -> tuple[float, float]:
    """Bytes a neuron and step that (forward, backward) must move, tensors beyond the caches.

    Forward reads ``x`` and writes spikes, and the last voltage; backward reads the spikes'
    gradients and ``x``, writes ``x``'s gradient. Add 4/T for an initial voltage, for its gradient
    and for the last voltage's.

    >>> traffic(Options(torch.float32, 4, 0.0, True, False))
    (9.0, 12.0)
    >>> traffic(Options(torch.float16, 8, 0.0, True, False))
    (4.5, 6.0)
    """
    size, state = options.dtype.itemsize, 4
    checkpoint = state * checkpoints(options.steps) / options.steps
    v_seq = state if options.v_seq else 0
    return (
        2 * size + state / options.steps + checkpoint + v_seq,
        3 * size + checkpoint + v_seq,
    )
