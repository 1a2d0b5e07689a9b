"""The batch norm that a neuron applies to its input.

The definition is torch's own batch norm over time, batch and space. Its result has the dtype of the
state: it is never rounded to that of a half-precision input. The fused backends take mean and rstd
from it, and compute ``(x - mean) (weight rstd) + bias`` themselves, in forward and again in
backward; the README of ``sj_taid/ops/alif`` has the gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sj_taid._internal import graph


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
