"""Batch norm in training: its statistics, its output, and the running statistics, moved in place.

Each channel's values, less its first one, and their squares are added up in float64. As the first
one is among the values, what cancels is at most as many times the variance as there are values.
A part is some samples: the first kernel makes their sums, the second one their output.
"""

# numba infers the types of the functions that it compiles.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import loops, threads
from .loops import _at, _double_at, _inline, _sum, _sums, _total

#: values, and neighbours of one channel, from which this takes less time than torch's
LEAST, LEAST_INNER = 1 << 15, 4
#: the places of tensors' addresses: running statistics, and momentum and eps in float64
RUNNING_MEAN, RUNNING_VAR, NUMBERS = (loops.OPERANDS + k for k in range(3))
_GIVEN = loops.X, loops.WEIGHT, loops.BIAS, RUNNING_MEAN, RUNNING_VAR, NUMBERS
_PLACES = *_GIVEN, loops.SPIKE, loops.MEAN, loops.RSTD


@_inline
def _origin(a, c):
    """What is taken from a channel's values: its first one, or 0, since that may be infinite."""
    first = _at(a.at[loops.X], c * a.inner)[0]
    return np.float64(first) if abs(first) < np.float32(np.inf) else 0.0


@_sum
def _add_moments(a, scratch, part):
    """Add the values of samples, less their channel's first one, and their squares."""
    sums, squares = _sums(a, part, 0), _sums(a, part, 1)
    for c in range(a.channels):
        sums[c] = squares[c] = 0.0
    for sample in range(part, a.steps, a.parts):
        for c in range(a.channels):
            x, origin = _at(a.at[loops.X], sample * a.neurons + c * a.inner), _origin(a, c)
            total, square = 0.0, 0.0
            for i in range(a.inner):
                less = np.float64(x[i]) - origin
                total += less
                square += less * less
            sums[c] += total
            squares[c] += square


@_inline
def _store(a, scratch, part):
    """The output of samples, in a neuron's operations."""
    mean, rstd = _at(a.at[loops.MEAN], 0), _at(a.at[loops.RSTD], 0)
    weight, bias = _at(a.at[loops.WEIGHT], 0), _at(a.at[loops.BIAS], 0)
    for sample in range(part, a.steps, a.parts):
        for c in range(a.channels):
            here, m = sample * a.neurons + c * a.inner, mean[c]
            gain = rstd[c] * weight[c] if a.at[loops.WEIGHT] else rstd[c]
            b = bias[c] if a.at[loops.BIAS] else np.float32(0)
            x, y = _at(a.at[loops.X], here), _at(a.at[loops.SPIKE], here)
            for i in range(a.inner):
                y[i] = (x[i] - m) * gain + b


@_inline
def _finish(a):
    """Mean and ``(var + eps)^(-1/2)`` of the sums, and the running statistics, moved."""
    mean, rstd = _at(a.at[loops.MEAN], 0), _at(a.at[loops.RSTD], 0)
    running_mean, running_var = _at(a.at[RUNNING_MEAN], 0), _at(a.at[RUNNING_VAR], 0)
    momentum, eps = _double_at(a.at[NUMBERS], 0)[0], _double_at(a.at[NUMBERS], 1)[0]
    for c in range(a.channels):
        less = _total(a, 0, c) / a.count
        square = max(_total(a, 1, c) - _total(a, 0, c) * less, 0.0)
        middle, spread = _origin(a, c) + less, square / a.count + eps
        mean[c], rstd[c] = middle, 1.0 / np.sqrt(spread)
        if a.at[RUNNING_MEAN]:
            running_mean[c] = momentum * middle + (1.0 - momentum) * running_mean[c]
            unbiased = square / (a.count - 1.0)
            running_var[c] = momentum * unbiased + (1.0 - momentum) * running_var[c]


# numba caches these for the file of `loops`, so names tell which text of this one they are of.
_TEXT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
find_moments = loops._kernel(f"find_moments_{_TEXT}", _add_moments, _finish)
store = loops._kernel(f"store_{_TEXT}", _store, loops._nothing)


def plan_norm(x: Tensor) -> Any:
    """The batch norm in training of such ``x`` ``[M, C, *]``, or ``None``: torch's is as fast."""
    samples, channels, values = *x.shape[:2], x.numel()
    inner, is_plain = values // (samples * channels), x.dtype == torch.float32
    if not is_plain or not x.is_contiguous() or values < LEAST or inner < LEAST_INNER:
        return None
    parts = min(samples, threads.PARTS, -(-values // threads.GRAIN))
    options: Any = {"parts": parts, "ranges": parts, "sums_size": 2 * parts * channels}
    options |= {"channels": channels, "inner": inner, "count": samples * inner}
    options |= {"steps": samples, "neurons": channels * inner, "scratch_size": 0}
    return partial(_run, [threads.Call(k, _PLACES, **options) for k in (find_moments, store)])


def _run(calls: Any, x: Tensor, *given: Tensor | None, momentum: float, eps: float) -> Any:
    """Output, mean and ``(var + eps)^(-1/2)`` of ``x``.

    ``given``: weight, bias, and the running mean and variance, which move, both or neither. All are
    float32 and contiguous.
    """
    numbers = torch.tensor((momentum, eps), dtype=torch.float64, device="cpu")
    y, mean, rstd = (x.new_empty(shape) for shape in (x.shape, x.shape[1], x.shape[1]))
    if x.nbytes >= 2 * threads.HUGE:
        threads.ask_for_huge_pages(y)
    for call in calls:
        call((), x, *given, numbers, y, mean, rstd)
    return y, mean, rstd
