"""The batch norm that a neuron applies to its input.

The definition is torch's own batch norm over time, batch and space. Its result has the dtype of the
state: it is never rounded to that of a half-precision input. The fused backends take mean and rstd
from it, and compute ``(x - mean) (weight rstd) + bias`` themselves, in forward and again in
backward; the README of ``sj_taid/ops/step`` has the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sj_taid._internal import graph
from sj_taid.ops.step import reference
from sj_taid.ops.step.autograd import apply_fused
from sj_taid.ops.step.fused import _ALIF, operands_of
from sj_taid.ops.step.plan import Engine, find_plan, spec_of
from sj_taid.ops.step.program import Reading
from sj_taid.ops.step.record import Neuron, Notes


class BatchNorm(NamedTuple):
    """A batch norm over axis 2 of ``[T, N, C, *]``; every tensor is ``[C]``, or ``None``."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    #: whether to use the batch's statistics and update the running ones, or to use the running ones
    use_batch_statistics: bool
    #: weight of the batch's statistics in the updated running ones
    momentum: float
    eps: float


def batch_norm(x_seq: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's batch norm of ``x_seq`` ``[T, N, C, *]``, with the mean and rstd ``[C]`` it used."""
    x = x_seq.flatten(0, 1)
    # torch wants one dtype, which for a net in half precision is that of x, float32.
    tensors: Any = (t if t is None else t.to(x.dtype) for t in norm[:4])
    weight, bias, mean, var = tensors
    is_batchs = norm.use_batch_statistics
    options = is_batchs, norm.momentum, norm.eps, torch.backends.cudnn.enabled
    y, batch_mean, rstd, *_ = graph.batch_norm(x, weight, bias, mean, var, *options)
    for running, moved in ((norm.running_mean, mean), (norm.running_var, var)):
        if is_batchs and running is not None and moved is not None and moved is not running:
            running.copy_(moved)
    if not is_batchs:
        batch_mean, rstd = mean.clone(), (var + norm.eps).rsqrt()
    return y.unflatten(0, x_seq.shape[:2]), batch_mean, rstd


def with_norm(
    multi_step: Callable[..., Any], norm: BatchNorm | None, pack: bool = False
) -> Callable[..., Any]:
    """A backend's ``multi_step`` of the ``norm`` of its input; a fused one may give bits too."""
    if multi_step is reference.multi_step:
        return partial(_define, norm)
    (engine,) = multi_step.args
    return partial(_fuse, engine, norm, pack)


def _define(norm: BatchNorm | None, x_seq: Tensor, *others: Any, **options: Any) -> tuple[Any, ...]:
    if norm is None:
        return reference.multi_step(x_seq, *others, **options)
    y_seq, *_ = batch_norm(x_seq.to(reference.state_dtype(x_seq.dtype)), norm)
    spike_seq, *voltages = reference.multi_step(y_seq, *others, **options)
    return spike_seq.to(x_seq.dtype), *voltages


def _fuse(
    engine: Engine,
    norm: BatchNorm | None,
    pack: bool,
    *tensors: Any,
    store_v_seq: bool,
    **options: Any,
) -> tuple[Any, ...]:
    """As an accelerated net calls a plan."""
    operands, v_init = operands_of(*tensors)
    x_seq, _, *parameters = operands
    mean = rstd = weight = bias = None
    if norm is not None:
        weight, bias = norm[:2]
        with torch.no_grad():
            _, mean, rstd = batch_norm(x_seq.to(reference.state_dtype(x_seq.dtype)), norm)
    leaves = (*operands, weight, bias)
    saves = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    is_fixed = norm is not None and not norm.use_batch_statistics
    flags = (norm is not None, is_fixed, store_v_seq, pack, saves)
    spec = spec_of(x_seq, read_unchecked(x_seq.shape[1:], parameters, options), *flags)
    plan = find_plan(engine, spec)
    results = apply_fused(plan, v_init, "", *operands, mean, rstd, weight, bias)
    return results if pack else results[:3]


def read_unchecked(shape: Any, parameters: Any, options: Any) -> Reading:
    """An ALIF's reading, which no backend has checked."""
    return Neuron(_ALIF(parameters, options), reference.run_step).read(shape, Notes())
