"""The batch norm that a neuron applies to its input: its definition, and its terms per channel.

The definition is torch's own batch norm over time, batch and space. Its result has the dtype of the
state: it is never rounded to that of a half-precision input.

The fused backends never write that result: README.md has their forward, ``(x - shift) gain +
offset``, and gradients. With mean mu and variance var of a channel over its n values,

    r = (var + eps)^(-1/2)      gain = weight r
    shift = mu rounded to float32      offset = bias - (mu - shift) gain
    B = gain r dweight / n      A = gain dbias / n - B (mu - shift)

which is accurate also if mu is large compared with the deviation. Saved for backward: the input,
and numbers per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: the shape and strides of a sequence
Layout = tuple[tuple[int, ...], tuple[int, ...]]


class Norm(NamedTuple):
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
    #: the numbers of :func:`affine`, if the statistics have been taken already
    affine: Affine | None = None

    @property
    def fixed(self) -> bool:
        """Whether the statistics are the running ones, which do not depend on the input."""
        tracked = self.running_mean is not None and self.running_var is not None
        return tracked and not self.use_batch_statistics

    @classmethod
    def of(cls, module: Any) -> Norm:
        """What a batch norm module would compute; counts the batch, as its forward does."""
        training: bool = module.training
        momentum = 0.0 if module.momentum is None else module.momentum
        # Statistics that are not tracked in training are used in eval mode all the same.
        reads = module.track_running_stats or not training
        if training and reads and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            if module.momentum is None:  # the plain average over all batches
                momentum = 1.0 / float(module.num_batches_tracked)
        use_batch_statistics = training or module.running_mean is None
        return cls(
            module.weight,
            module.bias,
            module.running_mean if reads else None,
            module.running_var if reads else None,
            use_batch_statistics,
            momentum,
            module.eps,
        )

    def detach(self) -> Norm:
        """The same norm, whose parameters receive no gradient."""
        weight, bias = (t if t is None else t.detach() for t in (self.weight, self.bias))
        return self._replace(weight=weight, bias=bias)


def batch_norm(x_seq: Tensor, norm: Norm) -> Tensor:
    """Torch's batch norm over time, batch and space of ``x_seq`` ``[T, N, C, *]``."""
    x = x_seq.flatten(0, 1)
    # torch wants one dtype, which for a net in half precision is that of x, float32.
    weight, bias, mean, var = (t if t is None else t.to(x.dtype) for t in norm[:4])
    y = F.batch_norm(x, mean, var, weight, bias, norm.use_batch_statistics, norm.momentum, norm.eps)
    updates = ((norm.running_mean, mean), (norm.running_var, var))
    for running, moved in updates if norm.use_batch_statistics else ():
        if running is not None and moved is not None and moved is not running:
            running.copy_(moved)
    return y.unflatten(0, x_seq.shape[:2])


class Affine(NamedTuple):
    """The norm as ``y = (x - shift) gain + offset``."""

    #: float32: shift, gain and offset, which the kernels read, and weight and bias as they were
    table: Tensor
    mean_rstd: Tensor  #: mean and r, float64 ``[2, C]``

    def parameters(self, norm: Norm) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias at the call, whatever has become of those of ``norm``."""
        rows = iter(self.table[3:])
        weight, bias = (
            None if t is None else next(rows).to(t.dtype) for t in (norm.weight, norm.bias)
        )
        return weight, bias

    def kernel_numbers(self, x_seq: Tensor) -> Tensor:
        """Mean, r, gain and the number of values, float64 ``[4, C]``."""
        mean, rstd = self.mean_rstd
        count = torch.full_like(mean, x_seq.numel() / len(mean))
        return torch.stack([mean, rstd, self.table[1].double(), count])


@torch.no_grad()
def affine(norm: Norm, x_seq: Tensor, statistics: Callable[[Tensor], Tensor]) -> Affine:
    """The norm of ``x_seq``, with its running statistics updated.

    ``statistics`` gives each channel's mean and biased variance as float64 ``[2, C]``.
    """
    running: Any = (norm.running_mean, norm.running_var)
    mean_rstd = torch.stack(running).double() if norm.fixed else statistics(x_seq)
    shift, var = mean_rstd.float()
    if not norm.fixed:
        count = x_seq.numel() / len(var)
        for old, new in zip(running, (shift, var * (count / (count - 1))), strict=True):
            if old is not None:
                # As in torch's own batch norm, autograd does not count this change.
                old.data.lerp_(new.to(old.dtype), norm.momentum)
    mean, rstd = mean_rstd
    rstd.add_(norm.eps).rsqrt_()  # the variance until here
    gain = rstd if norm.weight is None else rstd * norm.weight
    offset = (shift - mean) * gain
    if norm.bias is not None:
        offset += norm.bias
    parameters = (t for t in (norm.weight, norm.bias) if t is not None)
    return Affine(torch.stack([shift, gain, offset, *parameters]).float(), mean_rstd)


def gradients(affine: Affine, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias.

    ``sums`` are those of G_y and of G_y (x - shift), float64 ``[2, C]``.
    """
    return (affine.mean_rstd[1] * _centred(affine, sums)).float(), sums[0].float()


def mean_terms(affine: Affine, sums: Tensor, x_seq: Tensor) -> Tensor:
    """A and B, float32 ``[2, C]``: how G_x depends on the batch's statistics."""
    mean, rstd, gain, count = affine.kernel_numbers(x_seq)
    b = gain * rstd * rstd * _centred(affine, sums) / count
    a = gain * sums[0] / count - b * (mean - affine.table[0])
    return torch.stack([a, b]).float()


def _centred(affine: Affine, sums: Tensor) -> Tensor:
    """The sum of G_y (x - mu)."""
    return sums[1] - (affine.mean_rstd[0] - affine.table[0]) * sums[0]
