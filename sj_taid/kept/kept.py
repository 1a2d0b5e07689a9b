"""Tensors that know how their values are made again, so that fewer bytes of them are saved.

A :class:`Kept` is an ordinary tensor with a :class:`.Recipe` of the values in its :class:`Memory`,
which its views share. An operation runs on the plain tensor, with hooks open for that one call that
save what the recipe saves instead of what lies, unchanged, in that memory. Where torch does not
ask, as in a custom ``autograd.Function``, the tensor is saved as it is.

What a function does is said in :mod:`.functions`. One that is not there is an operation: if its
result shows the memory of a kept tensor, the values are no longer known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .._internal import graph
from .saving import Recipe, recipe_of_counts, run_saving


class Memory:
    """What is known of a piece of memory; all kept tensors that lie in it share one."""

    __slots__ = ("address", "is_captured", "is_known", "nbytes")

    def __init__(self, tensor: Tensor) -> None:
        self.address, self.nbytes = tensor.data_ptr(), tensor.nbytes
        # The replays of a CUDA graph change values unseen.
        self.is_captured = graph.is_capturing(tensor)
        #: until something changes it, or may, that autograd does not see
        self.is_known = True


class Kept(Tensor):
    """A tensor with a recipe, by which it is saved; a norm's output also has a source."""

    _memory: Memory
    #: how the values of the whole memory are made again, as they were at this version
    _recipe: Recipe | None
    _known_version: int
    #: what a neuron takes instead of a norm's output, or of its views and copies
    _source: Any
    #: where all its values lie in the norm's input; ``None`` of a part
    _place: Any

    def recipe(self) -> Recipe | None:
        """How the values are made again, if that is known."""
        with graph.plain_functions():
            return self._recipe if self.covers(self) else None

    def covers(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` shows values that this recipe makes, all or some, unchanged.

        A tensor in this memory must be alive: addresses are compared.
        """
        memory, is_known = self._memory, self._memory.is_known
        if not is_known or tensor._version != self._known_version or tensor.dtype != self.dtype:
            return False
        try:
            offset = tensor.data_ptr() - memory.address
        except RuntimeError:  # a wrapper, which has no memory
            return False
        return 0 <= offset < memory.nbytes and memory.is_captured == graph.is_capturing(tensor)

    def __iter__(self) -> Iterator[Tensor]:  # torch's does not ask __torch_function__
        return iter(self.unbind()) if self.dim() else super().__iter__()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if graph.is_dynamo_near():
            return _handle_apart(func, types, args, kwargs or {})
        return _handle(func, types, args, kwargs or {})


def attach(
    tensor: Any,
    memory: Memory,
    recipe: Recipe | None,
    source: Any = None,
    place: Any = None,
    version: int | None = None,
) -> Tensor:
    """Make a plain ``tensor`` a kept one, or give one that has changed other entries."""
    tensor._known_version = tensor._version if version is None else version
    tensor.__class__ = Kept
    tensor._memory, tensor._recipe = memory, recipe
    tensor._source, tensor._place = source, place
    return tensor


# ---- what functions do ---------------------------------------------------------------------------

#: a function of torch -> the function that handles it; another one is :func:`operate`
HANDLERS: dict[Any, Callable[[Any, Any, Any], Any]] = {}


def handles(*functions: Any) -> Callable[[Any], Any]:
    """A decorator that enters a handler of these functions, in place of an earlier one."""

    def register(handler: Any) -> Any:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def _handle(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for kind in types:
        if kind is not Kept and kind is not Tensor and not issubclass(kind, Kept):
            return run_plain(func, args, kwargs)  # another's subclass, which decides itself
    with graph.plain_functions():
        return HANDLERS.get(func, operate)(func, args, kwargs)


#: the same while a graph of torch.compile runs or is traced, which breaks there
_handle_apart = graph.outside_graphs(_handle)


def run_plain(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a function on plain tensors."""
    args, kwargs = tree_map_only(Kept, leave, (args, kwargs))
    return func(*args, **kwargs)


@graph.outside_graphs
def leave(tensor: Kept) -> Tensor:
    """The same values as a plain tensor."""
    with graph.plain_functions():
        return tensor.as_subclass(Tensor)


def expose(func: Any, args: Any, kwargs: Any) -> Any:
    """Run what gives unseen access to memory, so that the values are no longer known."""
    for tensor in kept_in(args, kwargs, func):
        tensor._memory.is_known = False
    return func(*args, **kwargs)


def operate(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation, which may save the values that it reads."""
    if getattr(func, "__module__", None) == "torch.distributed.distributed_c10d":
        return expose(func, args, kwargs)
    return run(func, args, kwargs)


def run(func: Any, args: Any, kwargs: Any, peak: int | None = None, recipe_of: Any = None) -> Any:
    """Run an operation by :func:`.run_saving`; its results are whole numbers up to ``peak``."""
    kept = kept_in(args, kwargs, func)
    result = run_saving(kept, func, args, kwargs, recipe_of)
    for tensor in result if isinstance(result, list | tuple) else [result]:
        if isinstance(tensor, Tensor):
            describe(tensor, kept, recipe_of_counts(tensor, peak))
    return result


def kept_in(args: Iterable[Any], kwargs: dict[str, Any], reader: Any = None) -> list[Kept]:
    """The kept tensors among arguments, and in lists of them; a norm learns of a ``reader``."""
    kept: list[Kept] = []
    for values in (args, kwargs.values()) if kwargs else (args,):
        for value in values:
            if isinstance(value, Kept):
                kept.append(value)
            elif isinstance(value, list | tuple):
                kept += [v for v in value if isinstance(v, Kept)]
    for tensor in kept if reader else ():
        if tensor._source is not None:
            tensor._source.note(reader)
    return kept


def describe(result: Tensor, kept: Iterable[Any], recipe: Recipe | None) -> None:
    """Give the result of an operation on ``kept`` tensors its recipe."""
    if result.is_inference():
        return
    for tensor in kept:
        if tensor is not result and graph.shares_memory(result, tensor):
            tensor._memory.is_known = False  # shown by a function that is no view
    # Eight bits do not hold every count.
    is_exact = result.is_floating_point() and result.itemsize > 1
    if recipe is not None and is_exact and fills_memory(result):
        attach(result, result._memory if type(result) is Kept else Memory(result), recipe)


def fills_memory(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory, in any order."""
    if not graph.address_of(tensor):  # a wrapper of torch.func
        return False
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes and not tensor.storage_offset()
    if not whole or tensor.is_contiguous():
        return whole
    return bool(tensor.stride() == torch.empty_like(tensor, device="meta").stride())
