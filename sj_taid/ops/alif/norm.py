"""The batch norm that a neuron applies to its input.

The definition is torch's own batch norm over time, batch and space. Its result has the dtype of the
state: it is never rounded to a half-precision input's dtype.

The fused backends never write that result: README.md has their forward, ``(x - shift) gain +
offset``, and gradients. With mean mu and variance var of a channel over its n values,

    r = (var + eps)^(-1/2)      gain = weight r
    shift = mu rounded to float32      offset = bias - (mu - shift) gain
    B = gain r dweight / n      A = gain dbias / n - B (mu - shift)

which is accurate also if mu is large compared with the deviation. Saved for backward: the input,
and numbers per channel.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


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

    @property
    def fixed(self) -> bool:
        """Whether the statistics are the running ones, which do not depend on the input."""
        tracked = self.running_mean is not None and self.running_var is not None
        return tracked and not self.use_batch_statistics


def batch_norm(x_seq: Tensor, norm: Norm) -> Tensor:
    """Torch's batch norm over time, batch and space of ``x_seq`` ``[T, N, C, *]``."""
    x = x_seq.flatten(0, 1)
    # torch wants one dtype, which for a net in half precision is x's, float32.
    weight, bias, mean, var = (t if t is None else t.to(x.dtype) for t in norm[:4])
    y = F.batch_norm(x, mean, var, weight, bias, norm.use_batch_statistics, norm.momentum, norm.eps)
    updates = ((norm.running_mean, mean), (norm.running_var, var))
    for running, moved in updates if norm.use_batch_statistics else ():
        if running is not None and moved is not None and moved is not running:
            running.copy_(moved)
    return y.unflatten(0, x_seq.shape[:2])
