"""Recipes, by which values are made again in backward, and the hooks that save by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._internal import graph
from ..ops import backends, bits

#: A view that takes a smaller part of the memory is saved as it is: to make it again, backward
#: makes the whole.
_LEAST_PART = 1 / 16


@dataclass(eq=False)
class Recipe:
    """How all values of a dense tensor are made again, in the same memory order.

    Attributes:
        make: makes them of what is ``saved``.
        peak: an upper bound of the values if all are whole numbers >= 0, or NaN where it is more
            than 1; else ``None``.
        cost: passes over the values to make them.
        reference: a tensor of the net among ``saved``, and its version: if it is written to
            before backward, these values cannot be made again.
        is_saved: whether every operation saves by it; else sums alone do.
        holds_others: whether ``saved`` are tensors of the net, not bits. A detached tensor has no
            such recipe, which would keep them alive.
    """

    make: Callable[..., Tensor]
    saved: tuple[Tensor, ...] = ()
    peak: int | None = None
    cost: int = 1
    reference: tuple[Tensor, int] | None = None
    is_saved: bool = True
    holds_others: bool = False

    def saved_of(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """What is saved in place of ``tensor``, which shows all or some of these values."""
        return self.saved

    def of(self, tensor: Tensor) -> Recipe | None:
        """The recipe of ``tensor``, which shows all or some of these values."""
        view = tensor.shape, tensor.stride(), tensor.storage_offset()
        make = partial(_make_view, self.make, view)
        return Recipe(make, self.saved_of(tensor), self.peak, self.cost, self.reference)


def _make_view(make: Callable[..., Tensor], view: Any, *saved: Tensor) -> Tensor:
    return make(*saved).as_strided(*view)


class PackedRecipe(Recipe):
    """Whole numbers up to 14: spikes, saved as bits, and counts, saved as four bits."""

    peak: int

    def __init__(self, tensor: Tensor, peak: int = 1, packed: Tensor | None = None) -> None:
        self._numel, self.peak = tensor.numel(), peak
        self.make = partial(_unpack_counts, self._numel, tensor.dtype)
        self.saved = () if packed is None else (packed,)

    def saved_of(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if not self.saved:
            steps = math.gcd(self._numel, bits.STEPS_PER_BYTE)
            whole = tensor.detach().as_strided((self._numel,), (1,), 0).view(steps, -1)
            self.saved = (backends.engine_of(tensor.device.type).pack(whole, self.peak),)
        return self.saved


def _unpack_counts(numel: int, dtype: torch.dtype, packed: Tensor) -> Tensor:
    values = torch.empty(numel, dtype=dtype, device=packed.device)
    backends.engine_of(packed.device.type).unpack_into(packed, values)
    return values


def recipe_of_counts(tensor: Tensor, peak: int | None) -> PackedRecipe | None:
    """The recipe of whole numbers up to ``peak``, if four bits hold them."""
    return None if peak is None or peak > bits.LARGEST_COUNT else PackedRecipe(tensor, peak)


def unchanged(tensor: Tensor, version: int) -> Tensor:
    """``tensor``, or an error if it was written to: torch checks none that hooks have saved."""
    if (now := graph.version_of(tensor)) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a {tensor.dtype} tensor of shape {list(tensor.shape)} is at version "
            f"{now}; expected version {version} instead. Change a copy, as h = h + o instead of "
            "h += o, or sj_taid.unaccelerate(net)"
        )
    return tensor


# ---- hooks ---------------------------------------------------------------------------------------


def run_saving(
    kept: Sequence[Any],
    func: Any,
    args: Any,
    kwargs: Any,
    recipe_of: Callable[[Tensor], Recipe | None] | None = None,
) -> Any:
    """Run an operation that saves by the recipes of ``kept`` tensors what it saves of their memory.

    ``recipe_of`` gives recipes of what the operation saves besides, or ``None``.
    """
    # A norm's output is saved detached, without its source, which holds the norm's input.
    known = [t for t in kept if t._recipe or t._source is not None] if kept else []
    is_saving = (known or recipe_of is not None) and torch.is_grad_enabled()
    if not is_saving or not graph.allows_hooks():  # torch.func forbids them
        return func(*args, **kwargs)
    outer = graph.saving_hooks()
    if outer is not None and graph.are_checkpoints(outer):
        return func(*args, **kwargs)
    # While they are open they hold what is known, so what lies at its addresses is its own.
    pack = partial(_pack, known, recipe_of, outer)
    # An interrupt may come right after any call: opened within, and first; closed first.
    try:
        graph.push_hooks(pack, _unpack)
        return func(*args, **kwargs)
    finally:
        del known[:]  # autograd's graph holds both hooks
        graph.pop_hooks()


def _pack(known: list[Any], recipe_of: Any, outer: Any, tensor: Tensor) -> Any:
    """What is saved of a tensor: a function, its arguments, and how other hooks unpack these."""
    recipe = None if recipe_of is None else recipe_of(tensor)
    for whole in known if recipe is None else ():
        is_much = tensor.nbytes >= whole._memory.nbytes * _LEAST_PART
        if is_much and whole._recipe and whole._recipe.is_saved and whole.covers(tensor):
            recipe = whole._recipe.of(tensor)
            break
    if recipe is not None and recipe.reference is not None:
        reference, version = recipe.reference
        # Other hooks may save a copy, of which no version tells whether the reference has changed.
        if graph.are_others(outer) or graph.version_of(reference) != version:
            recipe = None
    if outer is not None:
        pack, unpack = outer
        make, saved = (recipe.make, recipe.saved) if recipe else (_same, (tensor,))
        return make, tuple(map(pack, saved)), unpack
    if recipe is None:
        # An output of the operation has a graph, which holds what is saved.
        values = tensor if tensor.is_leaf else tensor.detach()
        return partial(unchanged, version=tensor._version), (values,), None
    return recipe.make, recipe.saved, None


def _unpack(packed: Any) -> Tensor:
    make, saved, unpack = packed
    return make(*(saved if unpack is None else map(unpack, saved)))


def _same(tensor: Tensor) -> Tensor:
    return tensor
