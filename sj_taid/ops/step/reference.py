"""The definition of the ALIF neuron in plain torch.

Every faster path is tested against this file. It is written to be read: one line for each
equation, differentiated by autograd.

Symbols: ``q = sigmoid(w) = 1/tau`` with tau in time steps; ``X`` input current, ``V`` membrane
potential after the reset, ``H`` before it, ``S`` spikes or counts, all dimensionless.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._internal.graph import is_watched
from .. import surrogate


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and state for an input: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def charge(
    x: Tensor,
    v: Tensor,
    q: Tensor | None,
    decay_input: bool,
    v_reset: float | None,
    counts: bool = False,
) -> Tensor:
    """``H = V + q (X - (V - V_reset))``; without ``decay_input`` ``H = V - q (V - V_reset) + X``.

    Without ``q`` there is no state: ``H = X``. The order of operations is SpikingJelly's, for
    ``counts`` that of its ``ILIFNode``, and the fused kernels repeat it unfused: then the same
    float32 inputs give the same spikes on every path.
    """
    if q is None:
        return x
    v_rest = 0.0 if v_reset is None else v_reset
    if decay_input:
        return v + (x - (v - v_rest)) * q
    if counts:
        return v * (1.0 - q) + x
    return v - (v - v_rest) * q + x


def fire(h: Tensor, v_threshold: Tensor, surrogate_function: Callable[[Tensor], Tensor]) -> Tensor:
    """A spike where ``H >= V_th``, or a count: ``round(clamp(H / V_th, 0, D))``, half to even.

    Counts are those of :class:`~sj_taid.ops.surrogate.MultiLevelSpikeCount`, which has D and the
    window of ``H / V_th``, bounds included, where ``dS/d(H / V_th)`` is 1, and not 0.
    """
    if surrogate.is_integer(surrogate_function):
        return surrogate_function(h / v_threshold)
    return surrogate_function(h - v_threshold)


def reset(
    h: Tensor, spike: Tensor, v_threshold: Tensor, v_reset: float | None, detach_reset: bool
) -> Tensor:
    """Hard: ``V = (1 - S) H + S V_reset``. Soft (``v_reset=None``): ``V = H - S V_th``."""
    if detach_reset:
        spike = spike.detach()
    if v_reset is None:
        return h - spike * v_threshold
    return (1.0 - spike) * h + spike * v_reset


def step(
    x: Tensor,
    v: Tensor,
    q: Tensor | None,
    v_threshold: Tensor,
    *,
    decay_input: bool,
    v_reset: float | None,
    surrogate_function: Callable[[Tensor], Tensor],
    detach_reset: bool,
) -> tuple[Tensor, Tensor]:
    """One step: the spikes or counts of an input ``[N, *]``, and the next ``V``."""
    counts = surrogate.is_integer(surrogate_function)
    h = charge(x, v, q, decay_input, v_reset, counts)
    spike = fire(h, v_threshold, surrogate_function)
    return spike, reset(h, spike, v_threshold, v_reset, detach_reset)


def run_step(node: Any, x: Tensor, states: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """:func:`step` of a module with ``w``, ``v_threshold`` and the options as attributes."""
    q = None if node.w is None else per_channel(node.w.sigmoid(), x)
    spike, v = step(
        x,
        states["v"],
        q,
        per_channel(node.v_threshold, x),
        decay_input=node.decay_input,
        v_reset=node.v_reset,
        surrogate_function=node.surrogate_function,
        detach_reset=node.detach_reset,
    )
    return spike, {"v": v}


def multi_step(
    x_seq: Tensor,
    v: Tensor | float,
    w: Tensor | None,
    v_threshold: Tensor,
    *,
    store_v_seq: bool,
    surrogate_function: Callable[[Tensor], Tensor],
    **options: Any,
) -> tuple[Any, ...]:
    """Run ``x_seq`` ``[T, N, *]`` from ``v`` ``[N, *]``.

    ``w`` and ``v_threshold`` are scalars or per channel, ``[C]`` on axis 2 of ``x_seq``; without
    ``w`` there is no state.

    Returns spikes ``[T, N, *]`` in ``x_seq``'s dtype, the last ``V`` ``[N, *]`` and, if
    ``store_v_seq``, every ``V`` ``[T, N, *]``, both in ``state_dtype``.
    """
    dtype = state_dtype(x_seq.dtype)
    if not isinstance(v, Tensor):
        v = torch.full_like(x_seq[0], v, dtype=dtype, requires_grad=False)
    if torch.compiler.is_compiling():
        # With dynamic=True torch fails where an autograd.Function that runs more than once is the
        # first to look at a float that it uses, such as math.pi or the surrogate's alpha.
        names = getattr(surrogate_function, "__dict__", ())
        for value in (math.pi, *(getattr(surrogate_function, name) for name in names)):
            isinstance(value, float)
    q = None if w is None else per_channel(w.to(dtype).sigmoid(), x_seq[0])
    threshold = per_channel(v_threshold.to(dtype), x_seq[0])
    options["surrogate_function"] = surrogate_function
    stacks_v = store_v_seq or is_watched()  # SpikingJelly's neurons always do, which is counted
    spike_seq, v_seq = [], []
    for x in x_seq:
        spike, v = step(x.to(dtype), v, q, threshold, **options)
        spike_seq.append(spike.to(x_seq.dtype))
        if stacks_v:
            v_seq.append(v)
    every_v = torch.stack(v_seq) if stacks_v else None
    return torch.stack(spike_seq), v, every_v if store_v_seq else None


def per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """Shape a ``[C]`` parameter to broadcast against ``[N, C, *]``; a scalar stays one."""
    return parameter.view(-1, *[1] * (x.dim() - 2)) if parameter.dim() else parameter
