"""Batch norm in training: its statistics, its output, and the running statistics, moved in place.

Each channel's values, less its first one, and their squares are added up in float64. As the first
one is among the values, what cancels is at most as many times the variance as there are values.
A part is some samples. Its sums are made in one pass, its output in the next.
"""

# numba infers the types of the functions that it compiles.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import hashlib
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import loops, threads
from .loops import _at, _double_at, _part, _sum, _sums, _terms, _total

#: values from which this takes less time than torch's, with its calls from Python
LEAST = 1 << 15
#: the places of tensors' addresses: momentum and eps in float64, running statistics
NUMBERS, RUNNING_MEAN, RUNNING_VAR = (loops.OPERANDS + k for k in range(3))
_PLACES = (loops.X, loops.SPIKE, loops.MEAN, loops.RSTD, loops.WEIGHT, loops.BIAS)


@_part
def _shift(x, i):
    """What is taken from a channel's values: its first one, or 0, since that may be infinite."""
    return np.float64(x[i]) if abs(x[i]) < np.float32(np.inf) else 0.0


@_sum
def _add_moments(a, part, first, last):
    """Add the values of samples, less their channel's first one, and their squares."""
    sums, squares, origin = _sums(a, part, 0), _sums(a, part, 1), _at(a.at[loops.X], 0)
    for c in range(a.channels):
        sums[c] = squares[c] = 0.0
    for sample in range(first, last):
        for c in range(a.channels):
            x = _at(a.at[loops.X], (sample * a.channels + c) * a.inner)
            shift, total, square = _shift(origin, c * a.inner), 0.0, 0.0
            for i in range(a.inner):
                less = np.float64(x[i]) - shift
                total += less
                square += less * less
            sums[c] += total
            squares[c] += square


@_part
def _store(a, first, last):
    """The output of samples, in a neuron's operations."""
    mean, gain, bias = _at(a.at[loops.MEAN], 0), _at(_terms(a), 0), _at(_terms(a), a.channels)
    for sample in range(first, last):
        for c in range(a.channels):
            here = (sample * a.channels + c) * a.inner
            x, y = _at(a.at[loops.X], here), _at(a.at[loops.SPIKE], here)
            m, g, b = mean[c], gain[c], bias[c]
            for i in range(a.inner):
                y[i] = (x[i] - m) * g + b


@_part
def _finish(a):
    """Mean and ``(var + eps)^(-1/2)``, and the running mean and variance, moved."""
    if not a.sums_only:
        return
    x, mean, rstd = _at(a.at[loops.X], 0), _at(a.at[loops.MEAN], 0), _at(a.at[loops.RSTD], 0)
    weight, bias = _at(a.at[loops.WEIGHT], 0), _at(a.at[loops.BIAS], 0)
    gains, biases = _at(_terms(a), 0), _at(_terms(a), a.channels)
    means, variances = _at(a.at[RUNNING_MEAN], 0), _at(a.at[RUNNING_VAR], 0)
    numbers = _double_at(a.at[NUMBERS], 0)
    momentum, eps = numbers[0], numbers[1]
    for c in range(a.channels):
        total = _total(a, 0, c)
        about = total / a.count
        square = _total(a, 1, c) - total * about
        square = 0.0 if square < 0.0 else square
        middle, spread = _shift(x, c * a.inner) + about, square / a.count + eps
        mean[c], rstd[c] = middle, 1.0 / np.sqrt(spread) if spread != 0.0 else 0.0
        gains[c] = rstd[c] * (weight[c] if a.at[loops.WEIGHT] else np.float32(1))
        biases[c] = bias[c] if a.at[loops.BIAS] else np.float32(0)
        if a.at[RUNNING_MEAN]:
            means[c] = momentum * middle + (1.0 - momentum) * means[c]
        if a.at[RUNNING_VAR]:
            unbiased = square / (a.count - 1.0)
            variances[c] = momentum * unbiased + (1.0 - momentum) * variances[c]


@_part
def _compute_part(a, scratch, part):
    first = part * a.part_size
    last = min(first + a.part_size, a.neurons // (a.channels * a.inner))
    if a.sums_only:
        _add_moments(a, part, first, last)
    else:
        _store(a, first, last)


# numba caches a kernel for the file of `loops`, so the name tells which text of this one it is of.
_TEXT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
normalize = loops._kernel(f"normalize_{_TEXT}", _compute_part, _finish)


@lru_cache(maxsize=256)
def _call(samples: int, channels: int, inner: int) -> threads.Call:
    """The kernel on parts of some samples: their sums, then their output."""
    values = samples * channels * inner
    size = -(-samples // min(samples, threads.PARTS, -(-values // threads.GRAIN)))
    ranges = -(-samples // size)
    options: Any = {"part_size": size, "parts": ranges, "ranges": ranges, "inner": inner}
    options |= {"steps": 1, "neurons": values, "channels": channels, "group": channels}
    options |= {"sums_size": (2 * ranges + 1) * channels, "scratch_size": 0}
    options["count"] = values / channels
    places = *_PLACES, NUMBERS, RUNNING_MEAN, RUNNING_VAR
    passes: Any = {"sums_only": True}, {}
    return threads.Call(normalize, places, ((), (), None), *passes, **options)


@lru_cache(maxsize=256)
def _numbers(momentum: float, eps: float) -> Tensor:
    return torch.tensor((momentum, eps), dtype=torch.float64, device="cpu")


def plan_norm(x: Tensor) -> Any:
    """The batch norm in training of such ``x`` ``[M, C, *]``, or ``None``: torch's is as fast."""
    if x.dtype != torch.float32 or not x.is_contiguous() or x.numel() < LEAST:
        return None
    samples, channels = x.shape[:2]
    return partial(_batch_norm, _call(samples, channels, x.numel() // (samples * channels)))


def _batch_norm(
    call: threads.Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and ``(var + eps)^(-1/2)`` of ``x``; the running ``mean`` and ``var`` move.

    All but ``x`` are float32, contiguous ``[C]`` or ``None``.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    batch_mean, rstd = (torch.empty(x.shape[1], dtype=x.dtype, device="cpu") for _ in range(2))
    if x.nbytes >= 2 * threads.HUGE:
        threads.ask_for_huge_pages(y)
    call((), x, y, batch_mean, rstd, weight, bias, _numbers(momentum, eps), mean, var)
    return y, batch_mean, rstd
