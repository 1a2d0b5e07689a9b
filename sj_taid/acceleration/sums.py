"""Sums in front of neurons: saved as their terms, and computed again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _graph
from .compact import Known, Packing, Term, _peak, describe, implements, saving

#: how many tensors a sum may be computed again from
_MOST_TERMS = 4
_IN_PLACE = (Tensor.add_, Tensor.__iadd__)


class Sum(Packing):
    """A sum of two tensors."""

    holds_others = True

    def __init__(self, tensor: Tensor, first: Term, second: Term) -> None:
        super().__init__(tensor)
        self._first, self._second = first, second
        self.size = first.size + second.size
        self.references = first.references + second.references
        if first.peak is not None and second.peak is not None:
            self.peak = first.peak + second.peak

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return self._first.parts + self._second.parts

    def restore(self, *parts: Tensor) -> Tensor:
        count = len(self._first.parts)
        return self._first.restore(*parts[:count]) + self._second.restore(*parts[count:])


@implements(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, *_IN_PLACE)
def _add(func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs or len(args) != 2 or not _graph.allows_hooks():
        return func(*args, **kwargs)
    known = [t for t in args if isinstance(t, Known)]
    first, second = map(_peak, args)
    peak = None if first is None or second is None else first + second
    terms = _terms(func, args)
    with saving(known):
        result = func(*args)
    memory = result.memory() if isinstance(result, Known) and terms else result
    packing = Sum(memory, *terms) if terms and not result.is_inference() else None
    describe(result, known, peak, packing)
    return result


def _terms(func: Any, args: tuple[Any, ...]) -> tuple[Term, ...]:
    """The two terms of a sum, taken before an addition in place changes one; none of other calls.

    A tensor that is not known, or is the sum of too many, is a term that stays in memory: one at
    most, since two take more than their sum, and none that may change, as one outside the graph.
    """
    if not torch.is_grad_enabled() or _graph.has_other_hooks():
        return ()
    if not all(isinstance(t, Tensor) for t in args) or _form(args[0]) != _form(args[1]):
        return ()
    terms = [t.term() if isinstance(t, Known) else None for t in args]
    if sum(term.size if term else 1 for term in terms) > _MOST_TERMS:
        terms = [term if term and term.size == 1 else None for term in terms]
    if terms[0] is None and func in _IN_PLACE:
        return ()
    pairs = zip(args, terms, strict=True)
    pair = tuple(found for t, term in pairs if (found := term or _reference(t)))
    return pair if len(pair) == 2 and sum(term.references for term in pair) < 2 else ()


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _reference(tensor: Tensor) -> Term | None:
    """A term that stays in memory; ``None`` outside the graph, where it may change."""
    if tensor.grad_fn is None:
        return None
    values, version = tensor.detach(), _graph.version_of(tensor)

    def restore(value: Tensor) -> Tensor:
        if _graph.version_of(values) != version:
            raise RuntimeError(
                "a term of a sum with spikes was changed in place before the backward: change a "
                "copy, as h = h + o instead of h += o, or sj_taid.unaccelerate(net)"
            )
        return value

    return Term((values,), restore, references=1)
