"""Choice of the kernel for a call: its source, its specialisation, its grid of threads.

Nothing here needs a GPU or CuPy; ``cuda.py`` compiles and launches what this file chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .cuda_text import step_text
from .plan import Spec
from .program import MOST_TOTALS, Program

#: The C++ types of the kernels, by the input's dtype.
SCALARS = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}

BLOCK = 128  # threads per block
ADDERS = 512  # the same where a block adds up a channel's sums
SEGMENT = 8  # steps per segment
LONGEST_SWEEP = 16  # steps without segments, of one state in float32; all else takes SEGMENT
NEED_X, NEED_NORM, NEED_TOTAL = 1, 2, 4  # and so on, a bit for each total

#: CuPy adds ``--ftz=true`` by itself: a voltage below 1.2e-38 is flushed to zero.
COMPILER_OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=true")

ALIGNMENT = 16  # bytes of the widest access

# Neurons per thread up to a number of steps, (float32, half): enough bytes requested at a time to
# keep memory busy, few enough registers for 4 to 6 blocks per multiprocessor.
_Vecs = tuple[tuple[float, tuple[int, int]], ...]
_FORWARD_VEC: _Vecs = ((2, (4, 8)), (math.inf, (4, 4)))
_NORM_FORWARD_VEC: _Vecs = ((1, (4, 8)), (math.inf, (4, 4)))
_BACKWARD_VEC: _Vecs = (
    (1, (4, 8)),
    (2, (4, 4)),
    (4, (2, 4)),
    (LONGEST_SWEEP, (1, 2)),
    (math.inf, (2, 2)),
)
_NORM_BACKWARD_VEC: _Vecs = ((2, (4, 4)), (4, (2, 2)), (math.inf, (1, 2)))


#: a step that gives its input, for kernels that know of none
NO_STEP = Program((), ("x",), ("g",), (), ((True,),))


@cache
def source(program: Program = NO_STEP, operands: int = 0, constants: int = 0) -> str:
    """``kernels.cu`` with a step's text, after the constants above and the step's sizes."""
    numbers = {"STATES": program.states, "OPERANDS": operands, "CONSTANTS": constants}
    numbers |= {"TOTALS": len(program.totals), "MOST_TOTALS": MOST_TOTALS}
    numbers |= {"LIVE": program.most_live(program.grads)}
    numbers |= {
        name: value for name, value in globals().items() if name.isupper() and type(value) is int
    }
    lines = "".join(f"constexpr int {name} = {value};\n" for name, value in numbers.items())
    kernels = Path(__file__).with_name("kernels.cu").read_text()
    kernels = kernels.replace('#include "step.h"\n', step_text(program))
    return f'{lines}#line 1 "kernels.cu"\n{kernels}'


def source_of(spec: Spec) -> str:
    """The text for a spec's neuron."""
    reading = spec.reading
    return source(reading.program, reading.operands, len(reading.constants))


def longest_sweep(dtype: torch.dtype, states: int) -> int:
    """The most steps that a thread holds in registers."""
    return LONGEST_SWEEP if dtype == torch.float32 and states < 2 else SEGMENT


def checkpoints(steps: int, dtype: torch.dtype, states: int = 1) -> int:
    """How often forward saves the states: at the start of each segment but the first.

    >>> [checkpoints(steps, torch.float32) for steps in (16, 17, 24, 25)]
    [0, 2, 2, 3]
    >>> [checkpoints(steps, torch.half) for steps in (8, 9, 16, 17)]
    [0, 1, 1, 2]
    """
    return 0 if steps <= longest_sweep(dtype, states) else (steps - 1) // SEGMENT


def forward(spec: Spec) -> tuple[str, int]:
    """The forward kernel's C++ name, with places for ``VEC`` and ``LANES``, and the largest VEC."""
    vecs = _NORM_FORWARD_VEC if spec.norm else _FORWARD_VEC
    packs = spec.pack and packs_bits(spec)
    return _specialise("neuron_forward", spec, spec.store_v_seq, vecs, f"{packs:d}")


def packs_bits(spec: Spec) -> bool:
    """Whether outputs are 0 and 1, which forward packs itself."""
    return spec.reading.levels == 1 and spec.reading.least == 0


def backward(spec: Spec, needs: int, v_seq: bool) -> tuple[str, int]:
    """The same of backward; ``v_seq``: whether every voltage has a gradient."""
    vecs = _NORM_BACKWARD_VEC if spec.norm else _BACKWARD_VEC
    return _specialise("neuron_backward", spec, v_seq, vecs, str(needs))


def _specialise(name: str, spec: Spec, v_seq: bool, vecs: _Vecs, more: str) -> tuple[str, int]:
    # States are float32 whatever the input is, and so are their gradients.
    column = 0 if spec.dtype == torch.float32 or v_seq else 1
    states = spec.reading.states
    vec = next(vec for steps, vec in vecs if spec.steps * max(1, states) <= steps)[column]
    T = template_steps(spec.steps, spec.dtype, states)
    return f"{name}<{SCALARS[spec.dtype]},{T},{{}},{{}},{v_seq:d},{spec.norm:d},{more}>", vec


def template_steps(steps: int, dtype: torch.dtype, states: int = 1) -> int:
    """``T`` of the templates; beyond a single sweep only the rest after the segments counts.

    >>> [template_steps(steps, torch.half) for steps in (8, 9, 16, 17)]
    [8, 17, 24, 17]
    """
    is_sweep = steps <= longest_sweep(dtype, states)
    return steps if is_sweep else LONGEST_SWEEP + 1 + (steps - 1) % SEGMENT


class Grid(NamedTuple):
    """How the neurons of one step are distributed over threads.

    Neuron ``i`` of a step, in storage order, has channel ``i / inner % channels``. A thread takes
    ``vec`` neighbours, then those ``vec * threads`` further, and so on; ``threads = rows * period``
    where the channels repeat after ``period`` packs of ``vec`` neurons. So a thread stays in its
    channel, or in its ``lanes = vec`` channels where neighbours have different channels.
    """

    size: int
    threads: int  #: that work; the rest of the last block is idle
    inner: int
    channels: int
    vec: int
    lanes: int
    rows: int
    period: int

    @property
    def partials(self) -> tuple[int, int, int]:
        """The members of ``Partials`` in ``kernels.cu``: where a channel's sums lie."""
        return self.rows, self.period * self.lanes // max(1, self.channels), self.channels


def grid(
    size: int,
    inner: int,
    channels: int,
    vec: int,
    aligned: bool,
    capacity: int,
    resident: Callable[[int, int], int],
) -> Grid:
    """Distribute ``size`` neurons over threads.

    ``vec`` is the most neurons per thread, which is halved until packs divide a step and its
    channels evenly, and while too few threads would be left to fill the GPU; ``aligned`` whether
    all tensors start at a multiple of 16 bytes; ``capacity`` how many threads the GPU holds,
    ``resident(vec, lanes)`` how many of the kernel's.
    """
    if size == 0:
        return Grid(0, 0, 1, channels, 1, 1, 0, channels)
    inner = inner if channels > 1 else 1
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
    return Grid(size, rows * period, inner, channels, vec, lanes, rows, period)


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
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return addresses % ALIGNMENT == 0
