"""Tensors that are saved for backward in fewer bytes, because they know how to be made again.

A :class:`Kept` is an ordinary tensor that knows its :class:`Memory`, which its views share, and
that a :class:`Recipe` of the values in it. An operation runs on the plain tensor, with hooks open
for that one call that save the recipe's parts instead of what lies, unchanged, in that memory.
Where torch does not ask, as in a custom ``autograd.Function``, the tensor is saved as it is.

What a function does is said by :data:`_HANDLERS`. One that is not there is an operation: if its
result shows the memory of a kept tensor, the values are no longer known.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import GetSetDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from .._internal import graph
from ..ops import backends, bits

#: A part smaller than one of so many is saved as it is: to make it again, all values would be.
_MOST_PARTS = 16


class Term(NamedTuple):
    """A tensor of a sum: what is saved of it, and the function that makes it again from that."""

    parts: tuple[Tensor, ...]
    make: Callable[..., Tensor]
    peak: int | None = None
    #: passes over its values to make it
    cost: int = 1
    #: tensors that stay in memory for it
    references: int = 0


class Recipe:
    """How all values of a dense tensor are made again, in the same memory order.

    ``peak``: an upper bound of the values if all are whole numbers >= 0, else ``None``.
    """

    peak: int | None = None
    #: whether every operation saves it; else sums alone do
    is_saved = True
    #: whether it keeps other tensors alive, which what is detached must not
    holds_others = False
    #: what to save of a tensor that shows these values
    parts: Callable[[Tensor], tuple[Tensor, ...]]
    #: the values of these parts
    make: Callable[..., Tensor]

    def term(self, tensor: Tensor) -> Term | None:
        """``tensor``, which shows these values, as a term of a sum, if it may be one."""
        return Term(self.parts(tensor), self.maker(tensor), self.peak)

    def maker(self, tensor: Tensor) -> Callable[..., Tensor]:
        """The function that makes ``tensor``, which shows these values, from its parts."""
        return partial(_make, self.make, (tensor.shape, tensor.stride(), tensor.storage_offset()))


def _make(make: Callable[..., Tensor], view: Any, *parts: Tensor) -> Tensor:
    return make(*parts).as_strided(*view)


class Counts(Recipe):
    """Whole numbers up to 15: spikes, saved as bits, and counts, saved as four bits."""

    def __init__(self, tensor: Tensor, peak: int = 1, packed: Tensor | None = None) -> None:
        self.peak, self._numel, self._saved = peak, tensor.numel(), packed
        self._dtype = tensor.dtype
        self._steps = math.gcd(self._numel, 8) if packed is None else tensor.shape[0]

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if self._saved is None:
            values = tensor.detach().as_strided((self._numel,), (1,), 0).view(self._steps, -1)
            engine = backends.engine_of(tensor.device.type)
            self._saved = engine.pack(values, self.peak or 0)
        return (self._saved,)

    def make(self, *parts: Tensor) -> Tensor:
        (saved,) = parts
        values = torch.empty(self._numel, dtype=self._dtype, device=saved.device)
        engine = backends.engine_of(saved.device.type)
        engine.unpack_into(saved, values)
        return values


def counts_of(tensor: Tensor, peak: int | None) -> Counts | None:
    """The recipe of whole numbers up to ``peak``, if four bits hold them."""
    return None if peak is None or peak > bits.LARGEST_COUNT else Counts(tensor, peak)


class Scaled(Recipe):
    """Whole numbers times a constant, saved as the whole numbers."""

    def __init__(self, whole: Tensor, recipe: Recipe, scale: Callable[[Tensor], Tensor]) -> None:
        """Before the multiplication, which may be in place: of ``whole``, all of its memory.

        ``scale`` multiplies in place.
        """
        self._parts, self._make, self._scale = recipe.parts(whole), recipe.make, scale

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return self._parts

    def make(self, *parts: Tensor) -> Tensor:
        return self._scale(self._make(*parts))


class Memory:
    """The memory of a dense tensor: the recipe of its values, and whether they are those still.

    All tensors in it share this. The output of a norm has a :class:`~.norms.Source` too.
    """

    __slots__ = (
        *("__weakref__", "address", "dtype", "is_captured", "is_known", "nbytes", "recipe"),
        *("source", "version"),
    )

    def __init__(self, tensor: Tensor, recipe: Recipe | None, source: Any = None) -> None:
        self.address, self.nbytes, self.dtype = tensor.data_ptr(), tensor.nbytes, tensor.dtype
        # The replays of a CUDA graph change values unseen.
        self.is_captured = graph.is_capturing(tensor)
        self.version, self.is_known = tensor._version, True
        self.recipe, self.source = recipe, source

    def is_of(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` shows these values, all or some, unchanged.

        A tensor in this memory must be alive: addresses are compared.
        """
        if not self.is_known or tensor._version != self.version or tensor.dtype != self.dtype:
            return False
        try:
            offset = tensor.data_ptr() - self.address
        except RuntimeError:  # a wrapper, which has no memory
            return False
        return 0 <= offset < self.nbytes and self.is_captured == graph.is_capturing(tensor)

    def expose(self) -> None:
        """Know the values no longer."""
        self.is_known, self.recipe, self.source = False, None, None

    def of_detached(self) -> Memory | Detached:
        """The memory of what is detached, which must keep no other tensor alive."""
        holds = self.source is not None or (self.recipe and self.recipe.holds_others)
        return Detached(self) if holds else self


class Detached:
    """The memory of a detached tensor: no recipe, but what changes its values is passed on."""

    recipe = source = None
    is_known = True

    def __init__(self, whole: Memory) -> None:
        self._whole = weakref.ref(whole)

    def is_of(self, tensor: Tensor) -> bool:
        return False

    def expose(self) -> None:
        if whole := self._whole():
            whole.expose()


class Kept(Tensor):
    """A tensor that says how it is saved, and of a norm's output from what a neuron computes it."""

    _memory: Any
    #: of a norm's output, its views and copies: where their values lie in the norm's input
    _place: Any = None

    def recipe(self) -> Recipe | None:
        """How the values are made again, if that is known."""
        with graph.plain_functions():
            return self._memory.recipe if self._memory.is_of(self) else None

    def watch(self) -> None:
        """Let no neuron take the norm's input instead: something takes this tensor's gradient."""
        if self._place is not None and self._memory.source is not None:
            self._memory.source.watch()

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """The node in autograd's graph; whoever has it may register a hook."""
        self.watch()
        with graph.plain_functions():
            return super().grad_fn

    def __reduce_ex__(self, protocol: Any) -> Any:  # as a plain tensor
        with graph.plain_functions():
            self._memory.expose()  # copy.copy shares it
            return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        with graph.plain_functions():
            values = self.as_subclass(Tensor)
            values = values.detach() if self.is_leaf else values
            memo.setdefault(id(memo), []).append(values)  # or the next tensor may get its id
            copied = values.__deepcopy__(memo).requires_grad_(self.requires_grad)
            is_parameter = isinstance(self, nn.Parameter)
            return nn.Parameter(copied, self.requires_grad) if is_parameter else copied

    def __iter__(self) -> Iterator[Tensor]:  # torch's does not ask __torch_function__
        return iter(self.unbind()) if self.dim() else super().__iter__()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        with graph.plain_functions():
            return repr(self.as_subclass(Tensor))

    def __format__(self, spec: str) -> str:
        with graph.plain_functions():
            return format(self.as_subclass(Tensor), spec)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if graph.is_dynamo_near():
            return _handle_apart(func, types, args, kwargs or {})
        return _handle(func, types, args, kwargs or {})


def keep(tensor: Any, memory: Any, place: Any = None) -> Tensor:
    """Let a plain ``tensor`` know its memory."""
    tensor.__class__ = Kept
    tensor._memory = memory
    if place is not None:
        tensor._place = place
    return tensor


# ---- what functions do ---------------------------------------------------------------------------


def _handle(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for kind in types:
        if kind is not Kept and kind is not Tensor and not issubclass(kind, Kept):
            return _leave(func, args, kwargs)  # another's subclass, which decides itself
    with graph.plain_functions():
        return _HANDLERS.get(func, _operate)(func, args, kwargs)


#: the same while a graph of torch.compile runs or is traced, which breaks there
_handle_apart = graph.outside_graphs(_handle)


def _leave(func: Any, args: Any, kwargs: Any) -> Any:
    with graph.plain_functions():
        args, kwargs = tree_map_only(Kept, lambda t: t.as_subclass(Tensor), (args, kwargs))
    return func(*args, **kwargs)


def _ask(func: Any, args: Any, kwargs: Any) -> Any:
    """A question about a tensor, which reads and shows no values."""
    return func(*args, **kwargs)


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """A view, a copy or a cast, which save no values for backward."""
    result = func(*args, **kwargs)
    whole = args[0] if args else None
    if type(whole) is not Kept or result is whole:
        return result
    if isinstance(result, list | tuple):
        for part in result:
            _describe_view(part, whole)
        return result
    _describe_view(result, whole)
    follows = whole._place is not None and torch.is_grad_enabled() and result.requires_grad
    follows = follows and whole._version == whole._memory.version  # else of changed values
    if follows and result.dtype == whole.dtype and result.numel() == whole.numel():
        source, place = whole._memory.source, whole._place.view(func, args[1:], kwargs)
        if source is not None and place is not None:
            if type(result) is not Kept:
                keep(result, Memory(result, None))
            result._memory.source, result._place = source, place
    return result


def _describe_view(result: Tensor, whole: Kept) -> None:
    """Let a view of ``whole``, or a copy, know what it shows."""
    memory, base = whole._memory, whole._base
    if not memory.is_known or type(result) is not Tensor or result.is_inference():
        return
    is_view = result._base is (whole if base is None else base) and result.dtype == whole.dtype
    if is_view or graph.shares_memory(result, whole):
        if result.dtype != whole.dtype:
            memory.expose()  # other numbers in the same memory
        elif whole.requires_grad and not result.requires_grad and type(memory) is Memory:
            keep(result, memory.of_detached())
        else:
            keep(result, memory)
    elif (recipe := memory.recipe) and memory.is_of(whole):
        same = result.dtype == whole.dtype and result.stride() == whole.stride()
        if same and _fills_memory(whole) and (result.requires_grad or not recipe.holds_others):
            keep(result, Memory(result, recipe))
        else:
            describe(result, (), counts_of(result, recipe.peak))


def _expose(func: Any, args: Any, kwargs: Any) -> Any:
    """Access to memory that autograd does not see, so that the values are no longer known."""
    for tensor in kept_in(args, kwargs):
        tensor._memory.expose()
    return func(*args, **kwargs)


def _watch(tensors: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """The handler of a function that takes the gradient of ``tensors(args, kwargs)``."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        for tensor in kept_in([tensors(args, kwargs)], {}):
            tensor.watch()
        return func(*args, **kwargs)

    return handle


def _operate(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on values, which may save them."""
    if getattr(func, "__module__", None) == "torch.distributed.distributed_c10d":
        return _expose(func, args, kwargs)
    return _run(func, args, kwargs)


def _contract(peak: Any = None) -> Callable[..., Any]:
    """The handler of an operation whose tensors autocast casts."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        if graph.is_autocast_enabled() and sum(isinstance(t, Tensor) for t in args) > 1:
            args = tuple(_lowered(t) if type(t) is Kept else t for t in args)
        return _run(func, args, kwargs, peak(args) if peak and not kwargs else None)

    return handle


def _lowered(tensor: Any) -> Any:
    """``tensor`` as autocast would cast it, which would save a tensor that nobody knows."""
    device = tensor.device.type
    if tensor.dtype != torch.float32 or tensor.is_meta or not torch.is_autocast_enabled(device):
        return tensor
    return _view(Tensor.to, (tensor, torch.get_autocast_dtype(device)), {})


def _join(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation that only copies values, so that counts stay counts."""
    peak = None
    if kwargs.keys() <= {"dim"}:
        peaks = [peak_of(t) for t in _flat(args) if isinstance(t, Tensor)]
        peak = None if None in peaks else max(peaks, default=None)  # type: ignore[type-var]
    return _run(func, args, kwargs, peak)


def _pool(dimensions: int, keeps_values: bool) -> Callable[..., Any]:
    """The handler of a pooling, of whose input the shape alone is read in backward."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        dilation = args[4] if len(args) > 4 else kwargs.get("dilation", 1)
        # A dilated window may lie in the padding, of which nothing is the greatest.
        known = keeps_values and dilation in (1, (1,), (1, 1), (1, 1, 1))
        plane = args[0].shape[-dimensions:].numel() if args else None
        return _run(func, args, kwargs, peak_of(args[0]) if known and args else None, plane)

    return handle


def peak_of(tensor: Any) -> int | None:
    recipe = tensor.recipe() if isinstance(tensor, Kept) else None
    return recipe.peak if recipe else None


def _peaks(combine: Callable[[int, int, Any], int]) -> Callable[[Any], int | None]:
    def combined(args: Any) -> int | None:
        if len(args) != 2:
            return None
        first, second = map(peak_of, args)
        return None if first is None or second is None else combine(first, second, args[0])

    return combined


def _multiply(peak: Any = None) -> Callable[..., Any]:
    """The handler of a product, or of a quotient, which may be one with a constant."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs or len(args) != 2 or type(args[1]) not in (int, float):
            return _run(func, args, kwargs, peak(args) if peak and not kwargs else None)
        whole, number = args
        recipe: Any = whole.recipe() if type(whole) is Kept else None
        is_whole = recipe is not None and isinstance(recipe, Counts)
        if not is_whole or not torch.is_grad_enabled() or not _fills_memory(whole):
            return _run(func, args, kwargs)
        dtype, strides = whole.dtype, whole.stride()
        operation: Any = Tensor.mul_ if peak else Tensor.div_
        scaled = Scaled(whole, recipe, partial(operation, other=number))
        result = run_saving([whole], func, args, kwargs)
        same = result.dtype == dtype and result.stride() == strides
        describe(result, [whole], scaled if same else None)
        return result

    return handle


def _linear(contract: Callable[..., Any]) -> Callable[..., Any]:
    """The handler of a linear layer, which would save a copy of spikes that are not contiguous."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        is_plain = kwargs or type(args[0]) is not Kept or args[0].dim() < 3
        if is_plain or args[0].is_contiguous() or graph.is_autocast_enabled():
            return contract(func, args, kwargs)
        x, weight, bias = (*args, None)[:3]
        y = contract(func, (_view(Tensor.contiguous, (x,), {}), weight), {})
        return y if bias is None else y.add_(bias)  # as torch: not within the matrix product

    return handle


def _subtract(func: Any, args: Any, kwargs: Any) -> Any:
    """``1 - spikes`` are spikes."""
    is_complement = not kwargs and args[1:] == (1,) and peak_of(args[0]) == 1
    return _run(func, args, kwargs, 1 if is_complement else None)


def _run(
    func: Any, args: Any, kwargs: Any, peak: int | None = None, plane: int | None = None
) -> Any:
    """Run an operation with hooks open; ``peak``: its results are whole numbers up to that."""
    kept = kept_in(args, kwargs)
    result = run_saving(kept, func, args, kwargs, plane)
    for tensor in result if isinstance(result, list | tuple) else [result]:
        if isinstance(tensor, Tensor):
            describe(tensor, kept, counts_of(tensor, peak))
    return result


def kept_in(args: Iterable[Any], kwargs: dict[str, Any]) -> list[Kept]:
    """The kept tensors among arguments, and in lists of them."""
    kept: list[Kept] = []
    for values in (args, kwargs.values()) if kwargs else (args,):
        for value in values:
            if isinstance(value, Kept):
                kept.append(value)
            elif isinstance(value, list | tuple):
                kept += [v for v in value if isinstance(v, Kept)]
    return kept


def describe(result: Tensor, kept: Iterable[Any], recipe: Recipe | None) -> None:
    """Let the result of an operation on ``kept`` tensors know its recipe."""
    if result.is_inference():
        return
    for tensor in kept:
        if tensor is not result and graph.shares_memory(result, tensor):
            tensor._memory.expose()  # shown by a function that is no view
    if recipe is None or not result.is_floating_point() or not _fills_memory(result):
        return
    if type(result) is Kept:
        memory = result._memory  # of values that have changed in place
        memory.version, memory.recipe, memory.source = result._version, recipe, None
    else:
        keep(result, Memory(result, recipe))


def _fills_memory(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory, in any order."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.storage_offset() == 0
    if not whole or tensor.is_contiguous():
        return whole
    return tensor.stride() == torch.empty_like(tensor, device="meta").stride()


def _flat(values: Iterable[Any]) -> list[Any]:
    """The values, and those of lists and tuples among them."""
    return [v for value in values for v in (value if isinstance(value, list | tuple) else [value])]


# ---- what is saved -------------------------------------------------------------------------------


class _Saving:
    """``saved_tensors_hooks`` that save what kept tensors show as their recipes' parts.

    It holds these while it is open, so what lies at their addresses is theirs. ``plane``: of
    pooling, how many pixels a plane has. Of its input the shape alone is saved, and indices into at
    most 32,768 pixels in 16 bits instead of 64.
    """

    __slots__ = ("kept", "outer", "plane")

    def __init__(self, kept: Any, plane: int | None, outer: Any) -> None:
        self.kept, self.plane, self.outer = kept, plane, outer

    def pack(self, tensor: Tensor) -> Any:
        make: Any = _unchanged
        parts: tuple[Tensor, ...] = (tensor,)
        view: Any = None
        if self.plane is not None and (found := _pooled(tensor, self.plane)):
            make, parts = found
        for other in self.kept if make is _unchanged else ():
            memory, recipe = other._memory, other._memory.recipe
            if not (recipe and recipe.is_saved and memory.is_of(tensor)):
                continue
            if tensor.nbytes * _MOST_PARTS >= memory.nbytes:
                make, parts = recipe.make, recipe.parts(tensor)
                view = tensor.shape, tensor.stride(), tensor.storage_offset()
                break
        if self.outer is not None:
            return make, tuple(map(self.outer[0], parts)), view, self.outer[1]
        if make is _unchanged:
            # An output of the operation has a graph, which holds what is saved.
            parts, view = (tensor if tensor.is_leaf else tensor.detach(),), tensor._version
        return make, parts, view, None


def _unpack(saved: Any) -> Tensor:
    make, parts, view, outer = saved
    if outer is not None:
        parts = tuple(map(outer, parts))
    if make is _unchanged:
        return parts[0] if outer is not None else _unchanged(*parts, view)
    values = make(*parts)
    return values if view is None else values.as_strided(*view)


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    """``tensor``, if it has this ``version`` still; torch checks none that hooks have saved."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a {tensor.dtype} tensor of shape {list(tensor.shape)} is at version "
            f"{tensor._version}; expected version {version} instead"
        )
    return tensor


def _pooled(tensor: Tensor, plane: int) -> Any:
    """How a pooling's backward makes its input and its indices again."""
    # It is known to read no value of its input on these devices.
    if tensor.is_floating_point() and tensor.device.type in ("cpu", "cuda"):
        options: Any = {"dtype": tensor.dtype, "device": tensor.device}
        return partial(torch.empty_strided, tensor.shape, tensor.stride(), **options), ()
    if tensor.dtype == torch.int64 and plane <= 1 << 15:
        return Tensor.long, (tensor.to(torch.int16),)
    return None


def run_saving(
    kept: Sequence[Kept], func: Any, args: Any, kwargs: Any, plane: int | None = None
) -> Any:
    """Run an operation while what ``kept`` tensors show is saved as their recipes' parts."""
    if not kept and plane is None:
        return func(*args, **kwargs)
    # A norm's output is saved without its source, which holds the norm's input.
    known = [t for t in kept if t._memory.recipe is not None or t._memory.source is not None]
    if (
        not (known or plane is not None)
        or not torch.is_grad_enabled()
        or not graph.allows_hooks()  # torch.func forbids them
    ):
        return func(*args, **kwargs)
    outer = graph.saving_hooks()
    if outer is not None and graph.are_checkpoints(outer):
        return func(*args, **kwargs)
    saving = _Saving(known, plane, outer)
    try:  # opened within, since an interrupt may come right after
        graph.push_hooks(saving.pack, _unpack)
        return func(*args, **kwargs)
    finally:
        saving.kept = ()  # autograd's graph holds both hooks
        graph.pop_hooks()


# ---- the table -----------------------------------------------------------------------------------


def _both(names: str) -> list[Any]:
    """The functions of these names, as methods and in torch."""
    homes = (Tensor, torch)
    return [getattr(home, name) for name in names.split() for home in homes if hasattr(home, name)]


_POOLS = {
    getattr(home, f"{kind}_pool{n}d{ending}"): _pool(n, "max" in kind)
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
    for n in (1, 2, 3)
    for ending in ("", "_with_indices")
    for home in (F, torch)
    if hasattr(home, f"{kind}_pool{n}d{ending}")
}
_ATTRIBUTES = {
    name: getattr(graph.TensorBase, name).__get__
    for name, kind in vars(graph.TensorBase).items()
    if isinstance(kind, GetSetDescriptorType)
}
_TURNED = [_ATTRIBUTES.pop(name) for name in ("T", "mT", "H", "mH") if name in _ATTRIBUTES]
_MEMORY = [_ATTRIBUTES.pop(name) for name in ("data", "real", "imag", "_base")]
#: A function of torch -> the function that handles it; another one is :func:`_operate`.
_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        [
            *_ATTRIBUTES.values(),
            *_both(
                "size stride dim ndimension numel nelement storage_offset element_size get_device"
            ),
            *_both("is_floating_point is_complex is_contiguous is_inference is_signed is_tensor"),
            *_both("type requires_grad_ __len__ is_set_to is_same_size"),
            *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")),
        ],
        _ask,
    ),
    **dict.fromkeys(
        [
            *_both("view reshape flatten unflatten transpose swapaxes swapdims permute t"),
            *_both("squeeze unsqueeze detach narrow select chunk split tensor_split unbind"),
            *_both("movedim moveaxis adjoint __getitem__ view_as reshape_as alias contiguous"),
            *_both("clone to float half bfloat16"),
            *_TURNED,
        ],
        _view,
    ),
    **dict.fromkeys(
        [
            *(*_MEMORY, Tensor.data.__set__, Tensor.data_ptr, Tensor.numpy),  # type: ignore[attr-defined]
            *(Tensor.untyped_storage, Tensor.storage, Tensor.__dlpack__, Tensor.__array__),
            Tensor.share_memory_,
            *(Tensor.apply_, Tensor.map_, Tensor.map2_),
        ],
        _expose,
    ),
    **dict.fromkeys(
        [Tensor.register_hook, Tensor.retain_grad], _watch(lambda args, kwargs: args[0])
    ),
    Tensor.backward: _watch(lambda args, kwargs: kwargs.get("inputs", (*args, *[None] * 5)[4])),
    torch.autograd.grad: _watch(lambda args, kwargs: args[1]),
    torch.autograd.backward: _watch(lambda args, kwargs: kwargs.get("inputs")),
    **dict.fromkeys(_both("cat concat stack"), _join),
    **_POOLS,
    **dict.fromkeys(
        _both("mul multiply __mul__ __rmul__ mul_ __imul__"),
        _multiply(_peaks(lambda a, b, _: a * b)),
    ),
    **dict.fromkeys(_both("div divide __truediv__ div_ __itruediv__"), _multiply()),
    **dict.fromkeys(
        _both("matmul __matmul__ bmm mm"),
        _contract(_peaks(lambda a, b, first: a * b * first.shape[-1])),
    ),
    **dict.fromkeys([torch.einsum, *_both("conv1d conv2d conv3d addmm baddbmm")], _contract()),
    **dict.fromkeys(_both("conv_transpose1d conv_transpose2d conv_transpose3d"), _contract()),
    F.linear: _linear(_contract()),
    Tensor.__rsub__: _subtract,
}


def implements(*functions: Any) -> Callable[[Any], Any]:
    """Let a function handle these functions of torch."""

    def register(handler: Any) -> Any:
        _HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def is_question(func: Any) -> bool:
    """Whether a function reads no values of its tensors."""
    return _HANDLERS.get(func) is _ask
