"""Sums in front of neurons: saved as their terms where that pays, and added again in backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._internal import graph
from .kept import Kept, Recipe, Term, counts_of, describe, implements, kept_in, peak_of, run_saving

#: Passes over the values that making a sum again may take: a norm takes three, and a term that
#: stays in memory counts as much.
_MOST_COST = 7
_IN_PLACE = (Tensor.add_, Tensor.__iadd__)


class Sum(Recipe):
    """A sum of two tensors."""

    holds_others = True

    def __init__(self, first: Term, second: Term) -> None:
        self._first, self._second = first, second
        if first.peak is not None and second.peak is not None:
            self.peak = first.peak + second.peak

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return self._first.parts + self._second.parts

    def make(self, *parts: Tensor) -> Tensor:
        count = len(self._first.parts)
        return self._first.make(*parts[:count]) + self._second.make(*parts[count:])

    def term(self, tensor: Tensor) -> Term:
        first, second = self._first, self._second
        cost, references = first.cost + second.cost, first.references + second.references
        return Term(self.parts(tensor), self.maker(tensor), self.peak, cost, references)


@implements(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, *_IN_PLACE)
def _add(func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs or len(args) != 2 or not graph.allows_hooks():
        return func(*args, **kwargs)
    kept, terms = kept_in(args, {}), _terms(func, args)
    first, second = map(peak_of, args)
    peak = None if first is None or second is None else first + second
    result = run_saving(kept, func, args, {})
    describe(result, kept, Sum(*terms) if terms else counts_of(result, peak))
    return result


def _terms(func: Any, args: tuple[Any, ...]) -> tuple[Term, ...]:
    """The two terms of a sum, taken before an addition in place changes one; none of other calls.

    A tensor without a recipe is a term that stays in memory: one at most, since two take more than
    their sum, and none that may change, as one outside the graph.
    """
    if not torch.is_grad_enabled() or graph.has_other_hooks():
        return ()
    if not all(isinstance(t, Tensor) for t in args) or _layout(args[0]) != _layout(args[1]):
        return ()
    terms = []
    for tensor in args:
        recipe = tensor.recipe() if isinstance(tensor, Kept) else None
        term = recipe.term(tensor) if recipe else None
        if term is None and ((func in _IN_PLACE and tensor is args[0]) or tensor.is_leaf):
            return ()
        terms.append(term or _reference(tensor))
    first, second = terms
    references = first.references + second.references
    pays = references < 2 and first.cost + second.cost + 3 * references <= _MOST_COST
    return (first, second) if pays else ()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _reference(tensor: Tensor) -> Term:
    """A term that stays in memory."""
    values = tensor.detach()
    return Term((values,), partial(_same, version=graph.version_of(values)), cost=0, references=1)


def _same(value: Tensor, version: int) -> Tensor:
    if graph.version_of(value) != version:
        raise RuntimeError(
            "a term of a sum with spikes was changed in place before the backward: change a "
            "copy, as h = h + o instead of h += o, or sj_taid.unaccelerate(net)"
        )
    return value
