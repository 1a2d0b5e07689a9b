"""Counts of spikes: found in a tensor by its values, and taken apart into zeros and ones."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: the largest count that is taken apart
_MOST = 15


class Counts(NamedTuple):
    """A tensor as ``factor * values``, where the values are counts, or real numbers."""

    values: Tensor
    levels: float = math.inf  #: the largest count, at least 1; infinity of real numbers
    factor: float = 1.0

    @property
    def are_few(self) -> bool:
        """Whether they are counts, which are taken apart."""
        return self.levels < math.inf

    def weights(self) -> Tensor:
        """How many ones each value is in its slices; one of a real number."""
        return (self.values if self.are_few else torch.ones_like(self.values)).float()

    def slices(self) -> list[Tensor]:
        """``values >= 1``, ``values >= 2``, ..., whose sum is ``values``; or these themselves."""
        if not self.are_few:
            return [self.values]
        return [(self.values >= k).to(self.values.dtype) for k in range(1, int(self.levels) + 1)]


def split_counts(x: Tensor) -> Counts:
    """The counts in ``x``, if all its values are whole numbers from 0 to 15, or such times one.

    A single number that is not whole, and what in 16 bits may as well be chance, is real.

    >>> split_counts(torch.tensor([0.0, 0.75, 0.25]))
    Counts(values=tensor([0., 3., 1.]), levels=3, factor=0.25)
    >>> split_counts(torch.tensor([3.14, 1.0])).levels
    inf
    """
    if not x.is_floating_point() or not x.numel():
        return Counts(x)
    least, most = map(float, x.aminmax())
    if not 0 <= least <= most < math.inf:
        return Counts(x)
    if most == 0:
        return Counts(x, 1)
    wide = x if x.itemsize > 2 else x.float()
    least = float(wide[wide > 0].min())
    of_least = range(1, int((_MOST + 0.5) * least / most) + 1)
    factors = [least / count for count in of_least]
    if x.itemsize <= 2:  # near a multiple of each other as any few numbers are
        factors = [least, *(1 / n for n in range(2, _MOST + 2))]
    # Each was rounded twice at most, and but once where few bits are left.
    bound = torch.finfo(x.dtype).eps * (2 if x.itemsize > 2 else 1)
    for factor in (1.0, *(factors if x.numel() > 1 else ())):
        values = (wide / factor).round()
        equal = (values * factor - wide).abs() <= bound * wide
        if values.max() <= _MOST and equal.all() and _is_sure(x, values, factor):
            return Counts(values.to(x.dtype), int(values.max()), factor)
    return Counts(x)


def _is_sure(x: Tensor, values: Tensor, factor: float) -> bool:
    """Whether ``x`` of 16 bits is ``factor * values`` to the bit, or has all counts to its most."""
    if x.itemsize > 2 or torch.equal((values * factor).to(x.dtype), x):
        return True
    return factor != 1.0 and values[values > 0].unique().numel() == values.max()
