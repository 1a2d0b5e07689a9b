"""Sums in front of neurons: saved as their terms where that pays, and added again in backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._internal import graph
from .functions import peak_of
from .kept import Kept, describe, handles, kept_in
from .saving import Recipe, recipe_of_counts, unchanged

#: Passes over the values that making a sum again may take: a norm takes three, and a term that
#: stays in memory counts as three.
_MOST_COST = 7
_IN_PLACE = (Tensor.add_, Tensor.__iadd__)


@handles(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, *_IN_PLACE)
def _add(func: Any, args: Any, kwargs: Any) -> Any:
    kept = kept_in(args, kwargs, func)
    if kwargs or len(args) != 2 or not graph.allows_hooks():
        return func(*args, **kwargs)
    recipe = _sum_of(func, args)
    first, second = map(peak_of, args)
    peak = None if first is None or second is None else first + second
    result = func(*args)  # which saves nothing
    if recipe is not None:
        recipe.peak = peak
    describe(result, kept, recipe or recipe_of_counts(result, peak))
    return result


def _sum_of(func: Any, args: tuple[Any, ...]) -> Recipe | None:
    """The recipe of a sum, taken before an addition in place changes a term.

    A tensor without a recipe is a term that stays in memory: one at most, since two take more than
    their sum, and none that may change, as one outside the graph.
    """
    if not torch.is_grad_enabled() or graph.are_others(graph.saving_hooks()):
        return None
    if not all(isinstance(t, Tensor) for t in args) or _layout(args[0]) != _layout(args[1]):
        return None
    terms = []
    for tensor in args:
        recipe = tensor.recipe() if isinstance(tensor, Kept) else None
        term = recipe.of(tensor) if recipe else None
        if term is None and ((func in _IN_PLACE and tensor is args[0]) or tensor.is_leaf):
            return None
        terms.append(term or _reference(tensor))
    first, second = terms
    cost = first.cost + second.cost
    if (first.reference and second.reference) or cost > _MOST_COST:
        return None
    make = partial(_add_again, first.make, second.make, len(first.saved))
    saved, reference = first.saved + second.saved, first.reference or second.reference
    return Recipe(make, saved, None, cost, reference, holds_others=True)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _reference(tensor: Tensor) -> Recipe:
    """The recipe of a term that stays in memory: the tensor itself."""
    values, version = tensor.detach(), graph.version_of(tensor)
    make = partial(unchanged, version=version)
    return Recipe(make, (values,), cost=3, reference=(values, version))


def _add_again(first: Any, second: Any, count: int, *saved: Tensor) -> Tensor:
    """The sum of two terms, the first made of ``count`` of what is saved."""
    return first(*saved[:count]) + second(*saved[count:])
