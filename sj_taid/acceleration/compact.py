"""Tensors that are saved for backward in fewer bytes, because they know how to be restored.

A :class:`Compact` is an ordinary tensor with a :class:`Packing`. Its views are compact too. An
operation on it runs on the plain tensor, with hooks open for that one call that save the packing
instead of what lies, unchanged, in the tensor's memory. Where torch does not ask, as in a custom
``autograd.Function``, the tensor is saved as it is.

What a function does is said by :data:`_HANDLERS`. One that is not there is an operation: if its
result shows the memory of a compact tensor, the values are no longer known.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from types import GetSetDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from .. import _graph
from ..ops import backends, bits

#: A part smaller than one of so many is saved as it is: to restore it, all values would be.
_MOST_PARTS = 16


class Term(NamedTuple):
    """A tensor of a sum: what is saved of it, and the function that restores it from that."""

    parts: tuple[Tensor, ...]
    restore: Callable[..., Tensor]
    size: int = 1
    peak: int | None = None
    references: int = 0


class Packing:
    """How the values of a dense tensor are saved.

    ``peak``: an upper bound of the values if all are whole numbers >= 0, else ``None``. ``size``:
    how many tensors they are the sum of; ``references``: how many of these stay in memory.
    """

    peak: int | None = None
    size = 1
    references = 0
    #: whether views have it too, though the values are unknown
    marks_views = False
    #: whether every operation may save it; else sums alone do
    is_saved = True
    #: whether it keeps other tensors alive, which what is detached must not
    holds_others = False
    #: what to save of a tensor that shows these values
    parts: Callable[[Tensor], tuple[Tensor, ...]]
    #: all the values of these parts, in a tensor of the same memory order
    restore: Callable[..., Tensor]

    def __init__(self, tensor: Tensor) -> None:
        self.address, self.size_in_memory = tensor.data_ptr(), tensor.nbytes
        self.version, self.dtype, self.is_known = tensor._version, tensor.dtype, True
        self._captured = _graph.is_capturing(tensor)

    def describes(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` shows these values, all or some, unchanged.

        The memory of one that shows them must be alive: its addresses are compared.
        """
        if not self.is_known or tensor._version != self.version or tensor.dtype != self.dtype:
            return False
        try:
            offset = tensor.data_ptr() - self.address
        except RuntimeError:  # a wrapper, which has no memory
            return False
        # Or a replay may have changed it.
        shows = 0 <= offset < self.size_in_memory
        return shows and self._captured == _graph.is_capturing(tensor)

    def saves_alone(self, tensor: Tensor) -> bool:
        """Whether :meth:`save` is all that an operation on ``tensor`` needs, which is the usual."""
        is_whole = self.is_known and tensor._version == self.version and self.size == 1
        return (
            is_whole
            and self.is_saved
            and torch.is_grad_enabled()
            and not torch._C._is_any_autocast_enabled()
            and _graph.allows_hooks()
            and _graph.saving_hooks() is None
            and (not tensor.is_cuda or _graph.is_capturing(tensor) == self._captured)
        )

    def save(self, tensor: Tensor) -> Any:
        """:meth:`Saving.pack` for these values alone, of which :meth:`saves_alone` is true."""
        shows = 0 <= tensor.data_ptr() - self.address < self.size_in_memory
        is_small = tensor.nbytes * _MOST_PARTS < self.size_in_memory
        if not shows or is_small or tensor.dtype != self.dtype:
            return tensor, tensor._version
        view = tensor.shape, tensor.stride(), tensor.storage_offset()
        return self.restore, self.parts(tensor), view

    @staticmethod
    def unpack(saved: Any) -> Tensor:
        """The tensor of which :meth:`save` was called."""
        if len(saved) == 2:
            return _unchanged(*saved)
        return saved[0](*saved[1]).as_strided(*saved[2])

    def expose(self) -> None:
        """Know the values no longer."""
        self.is_known = False

    def of_part(self, part: Tensor, whole: Tensor) -> Packing:
        """The packing of a tensor that shows some or all of these values."""
        is_detached = whole.requires_grad and not part.requires_grad
        return Detached(part, self) if self.holds_others and is_detached else self

    def restorer(self, tensor: Tensor) -> Callable[..., Tensor]:
        """The function that restores ``tensor``, which shows these values, from its parts."""
        view = tensor.shape, tensor.stride(), tensor.storage_offset()
        return partial(_restore, self.restore, view)

    def term(self, tensor: Tensor) -> Term | None:
        """``tensor``, which shows these values, as a term of a sum, if it may be one."""
        restore = self.restorer(tensor)
        return Term(self.parts(tensor), restore, self.size, self.peak, self.references)


def _restore(restore: Callable[..., Tensor], view: Any, *parts: Tensor) -> Tensor:
    return restore(*parts).as_strided(*view)


class Counts(Packing):
    """Whole numbers: spikes, saved as bits, and counts up to 15, as four bits."""

    def __init__(self, tensor: Tensor, peak: int = 1, packed: Tensor | None = None) -> None:
        super().__init__(tensor)
        self.peak, self._numel, self._saved = peak, tensor.numel(), packed
        self._steps = math.gcd(self._numel, 8) if packed is None else tensor.shape[0]

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if self._saved is None:
            values = tensor.detach().as_strided((self._numel,), (1,), 0).view(self._steps, -1)
            engine = backends.engine_of(tensor.device.type)
            self._saved = bits.pack_whole(values, self.peak or 0, engine.pack, engine.pack_counts)
        return (self._saved,)

    def restore(self, *parts: Tensor) -> Tensor:
        (saved,) = parts
        values = torch.empty(self._numel, dtype=self.dtype, device=saved.device)
        engine = backends.engine_of(saved.device.type)
        if self.peak == 1:
            engine.unpack_into(saved, values.view(self._steps, -1))
        else:
            engine.unpack_counts_into(saved, values)
        return values


class Scaled(Packing):
    """Whole numbers times a constant, saved as the whole numbers."""

    def __init__(self, whole: Tensor, packing: Packing, scale: Callable[[Tensor], Tensor]) -> None:
        """Before the multiplication, which may be in place: of ``whole``, all of its memory.

        ``scale`` multiplies in place.
        """
        self._parts, self._restore, self._scale = packing.parts(whole), packing.restore, scale

    def of(self, tensor: Tensor) -> Packing:
        """The packing of the product."""
        super().__init__(tensor)
        return self

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return self._parts

    def restore(self, *parts: Tensor) -> Tensor:
        return self._scale(self._restore(*parts))


class Detached(Packing):
    """Detached from a sum or a term: its values are unknown, and it keeps no other tensor alive."""

    marks_views = True

    def __init__(self, tensor: Tensor, whole: Packing) -> None:
        super().__init__(tensor)
        self.is_known, self._whole = False, weakref.ref(whole)

    def expose(self) -> None:
        if whole := self._whole():
            whole.expose()


class Known(Tensor):
    """A tensor that says how to save it: :class:`Compact`, or a norm's output."""

    _packing: Packing

    def packing(self) -> Packing | None:
        """How the values are saved, if they are known."""
        with torch._C.DisableTorchFunctionSubclass():
            return self._packing if self._packing.describes(self) else None

    def learn(self, packing: Packing) -> None:
        """Take the packing of values that have changed in place."""
        self._packing = packing

    def memory(self) -> Tensor:
        """The tensor that holds the values."""
        return self

    def term(self) -> Term | None:
        """The tensor as a term of a sum, if it may be one."""
        packing = self.packing()
        return packing.term(self) if packing else None

    def exposed(self) -> Tensor:
        """The tensor for an operation that hands out its memory."""
        self._packing.expose()
        return self

    def plain(self, reader: str) -> Tensor:
        """A tensor of no class of its own, for ``reader``."""
        return self.as_subclass(Tensor)

    def values(self) -> Tensor:
        """The values as they are now, for nobody who counts as a reader."""
        return self.as_subclass(Tensor)

    def watch(self) -> None:
        """Prepare for a gradient of its own, or for a hook that takes one."""

    def note_pool(self) -> None:
        """Note that a pool reads the tensor, of which it saves the shape alone."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # as a plain tensor
        with torch._C.DisableTorchFunctionSubclass():
            self.exposed()  # copy.copy shares it
            return self.plain("pickle").__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            values = self.plain("deepcopy")
            values = values.detach() if self.is_leaf else values
            memo.setdefault(id(memo), []).append(values)  # or the next tensor may get its id
            copied = values.__deepcopy__(memo).requires_grad_(self.requires_grad)
            is_parameter = isinstance(self, nn.Parameter)
            return nn.Parameter(copied, self.requires_grad) if is_parameter else copied

    def __iter__(self) -> Iterator[Tensor]:  # torch's does not ask __torch_function__
        return iter(self.unbind()) if self.dim() else super().__iter__()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return repr(self.plain("print"))

    def __format__(self, spec: str) -> str:
        with torch._C.DisableTorchFunctionSubclass():
            return format(self.plain("print"), spec)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if _graph.is_dynamo_near():
            return _handle_apart(func, types, args, kwargs or {})
        return _handle(func, types, args, kwargs or {})


class Compact(Known):
    """A tensor with memory and a packing."""


def compact(tensor: Tensor, packing: Packing) -> Tensor:
    """Let a plain ``tensor`` know its packing."""
    tensor.__class__ = Compact
    tensor._packing = packing  # type: ignore[attr-defined]
    return tensor


# ---- what functions do ---------------------------------------------------------------------------


def _handle(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for kind in types:
        if kind is not Compact and kind is not Tensor and not issubclass(kind, Known):
            return _leave(func, args, kwargs)  # another's subclass, which decides itself
    with torch._C.DisableTorchFunctionSubclass():
        return _HANDLERS.get(func, _operate)(func, args, kwargs)


#: the same while a graph of torch.compile runs or is traced, which breaks there
_handle_apart = torch._disable_dynamo(_handle)


def _leave(func: Any, args: Any, kwargs: Any) -> Any:
    name = func.__name__
    with torch._C.DisableTorchFunctionSubclass():
        args, kwargs = tree_map_only(Known, lambda t: t.plain(name), (args, kwargs))
    return func(*args, **kwargs)


def _ask(func: Any, args: Any, kwargs: Any) -> Any:
    """A question about a tensor, which reads and shows no values."""
    return func(*args, **kwargs)


def _list(func: Any, args: Any, kwargs: Any) -> Any:
    """The values as a list, which shows no memory."""
    return func(args[0].plain("tolist"))


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """A view, or a copy where there is none: they save no values for backward."""
    result = func(*args, **kwargs)
    source = args[0] if args else None
    if type(source) is not Compact:
        return result
    packing, base = source._packing, source._base
    if not (packing.is_known or packing.marks_views) or source._version != packing.version:
        return result
    if type(result) is not Tensor:
        for part in result if isinstance(result, list | tuple) else ():
            _describe_view(part, source, packing)
    elif result._base is (source if base is None else base) and result.dtype == packing.dtype:
        compact(result, packing.of_part(result, source) if packing.holds_others else packing)
    else:
        _describe_view(result, source, packing)
    return result


def _describe_view(result: Tensor, source: Tensor, packing: Packing) -> None:
    """Let a view of ``source``, or its copy, know its packing."""
    if result.is_inference():
        return
    if packing.describes(result) or (packing.marks_views and _graph.shares_memory(result, source)):
        compact(result, packing.of_part(result, source))
    elif _graph.shares_memory(result, source):
        packing.expose()  # other numbers in the same memory
    elif packing.peak is not None and packing.dtype == result.dtype and _fills_memory(result):
        compact(result, Counts(result, packing.peak))


def _expose(func: Any, args: Any, kwargs: Any) -> Any:
    """Access to memory that autograd does not see, so that the values are no longer known."""
    args, kwargs = tree_map_only(Known, lambda t: t.exposed(), (args, kwargs))
    return func(*args, **kwargs)


def _watch(tensors: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """The handler of a function that takes the gradient of ``tensors(args, kwargs)``."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        for tensor in _flat([tensors(args, kwargs)]):
            if isinstance(tensor, Known):
                tensor.watch()
        return func(*args, **kwargs)

    return handle


def _operate(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on values, which may save them."""
    if getattr(func, "__module__", None) == "torch.distributed.distributed_c10d":
        return _expose(func, args, kwargs)
    return _run(func, args, kwargs, None)


def _contract(peak_of: Any = None) -> Callable[..., Any]:
    """The handler of an operation whose tensors autocast casts."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        if not kwargs and type(args[0]) is Compact and not isinstance(args[1], Known):
            packing = args[0]._packing
            if peak_of is None and packing.saves_alone(args[0]):
                _graph.push_hooks(packing.save, Packing.unpack)
                try:
                    return func(*args)
                finally:
                    _graph.pop_hooks()
        if torch._C._is_any_autocast_enabled() and sum(isinstance(t, Tensor) for t in args) > 1:
            args = tuple(_lowered(t) if isinstance(t, Compact) else t for t in args)
        peak = peak_of(args) if peak_of and not kwargs else None
        known = _known(args, kwargs)
        result = run_saving(known, func, args, kwargs)
        if peak is not None:
            describe(result, known, peak)
        return result

    return handle


def _lowered(tensor: Any) -> Any:
    """``tensor`` as autocast would cast it, which would save a tensor that nobody knows."""
    device = tensor.device.type
    if tensor.dtype != torch.float32 or tensor.is_meta or not torch.is_autocast_enabled(device):
        return tensor
    return _copy(Tensor.to, (tensor, torch.get_autocast_dtype(device)), {})


def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation that only copies or casts values, so that counts stay counts."""
    peak = None
    if kwargs.keys() <= {"dim"}:
        peaks = [_peak(t) for t in _flat(args) if isinstance(t, Tensor)]
        peak = None if None in peaks else max(peaks, default=None)  # type: ignore[type-var]
    return _run(func, args, kwargs, peak)


def _pool(dimensions: int, keeps_values: bool) -> Callable[..., Any]:
    """The handler of a pooling, of whose input the shape alone is read in backward."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        dilation = args[4] if len(args) > 4 else kwargs.get("dilation", 1)
        # A dilated window may lie in the padding, of which nothing is the greatest.
        known = keeps_values and dilation in (1, (1,), (1, 1), (1, 1, 1))
        if args and isinstance(args[0], Known):
            args[0].note_pool()
        plane = args[0].shape[-dimensions:].numel() if args else None
        return _run(func, args, kwargs, _peak(args[0]) if known and args else None, plane)

    return handle


def _peak(tensor: Any) -> int | None:
    packing = tensor.packing() if isinstance(tensor, Known) else None
    return packing.peak if packing else None


def _peaks(combine: Callable[[int, int, Any], int]) -> Callable[[Any], int | None]:
    def peak_of(args: Any) -> int | None:
        if len(args) != 2:
            return None
        first, second = map(_peak, args)
        return None if first is None or second is None else combine(first, second, args[0])

    return peak_of


def _multiply(peak_of: Any = None) -> Callable[..., Any]:
    """The handler of a product, or of a quotient, which may be one with a constant."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs or len(args) != 2 or type(args[1]) not in (int, float):
            return _run(func, args, kwargs, peak_of(args) if peak_of and not kwargs else None)
        whole, number = args
        packing: Any = whole.packing() if type(whole) is Compact else None
        is_whole = packing is not None and packing.peak is not None and packing.size == 1
        if not is_whole or not torch.is_grad_enabled() or not _fills_memory(whole):
            return _run(func, args, kwargs, None)
        operation: Any = Tensor.mul_ if peak_of else Tensor.div_
        scaled = Scaled(whole, packing, partial(operation, other=number))
        result = run_saving([whole], func, args, kwargs)
        if result.dtype == packing.dtype and result.stride() == whole.stride():
            describe(result, [whole], None, scaled.of(result))
        return result

    return handle


def _linear(contract: Callable[..., Any]) -> Callable[..., Any]:
    """The handler of a linear layer, which would save a copy of spikes that are not contiguous."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs or type(args[0]) is not Compact or args[0].dim() < 3 or args[0].is_contiguous():
            return contract(func, args, kwargs)
        x, weight, bias = (*args, None)[:3]
        y = contract(func, (_view(Tensor.contiguous, (x,), {}), weight), {})
        return y if bias is None else y.add_(bias)  # as torch: not within the matrix product

    return handle


def _subtract(func: Any, args: Any, kwargs: Any) -> Any:
    """``1 - spikes`` are spikes."""
    is_complement = not kwargs and args[1:] == (1,) and _peak(args[0]) == 1
    return _run(func, args, kwargs, 1 if is_complement else None)


def _run(func: Any, args: Any, kwargs: Any, peak: int | None, plane: int | None = None) -> Any:
    """Run an operation with hooks open, and let its result know how it is saved."""
    known = _known(args, kwargs)
    result = run_saving(known, func, args, kwargs, plane)
    for tensor in result if isinstance(result, list | tuple) else [result]:
        if isinstance(tensor, Tensor):
            describe(tensor, known, peak)
    return result


def _known(args: Any, kwargs: Any) -> list[Known]:
    """The known tensors among arguments, and lists of them."""
    known: list[Known] = []
    for values in (args, kwargs.values()) if kwargs else (args,):
        for value in values:
            if isinstance(value, Known):
                known.append(value)
            elif isinstance(value, list | tuple):
                known += [v for v in value if isinstance(v, Known)]
    return known


def describe(
    result: Tensor, known: Iterable[Any], peak: int | None, packing: Packing | None = None
) -> None:
    """Let an operation's result know its packing, or a packing of whole numbers up to ``peak``."""
    if result.is_inference():
        return
    for tensor in known:
        others = type(tensor) is Compact and tensor is not result
        if others and _graph.shares_memory(result, tensor):
            tensor._packing.expose()  # shown by a function that is no view
    if packing is None and (peak is None or peak > bits.LARGEST_COUNT):
        return
    if not result.is_floating_point():
        return
    memory = result.memory() if isinstance(result, Known) else result
    if not _fills_memory(memory):
        return
    packing = packing or Counts(memory, peak or 0)
    result.learn(packing) if isinstance(result, Known) else compact(result, packing)


def _fills_memory(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory, in any order."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.storage_offset() == 0
    if not whole or tensor.is_contiguous():
        return whole
    return tensor.stride() == torch.empty_like(tensor, device="meta").stride()


def _flat(values: Iterable[Any]) -> list[Any]:
    """The values, and the values in lists and tuples among them."""
    return [v for value in values for v in (value if isinstance(value, list | tuple) else [value])]


# ---- what is saved -------------------------------------------------------------------------------


class Saving:
    """``saved_tensors_hooks`` that save what they know as its packing.

    ``plane``: of pooling, how many pixels a plane has. Of its input the shape alone is saved, and
    indices into at most 32,768 pixels in 16 bits instead of 64.
    """

    __slots__ = ("outer", "packings", "plane")

    def __init__(self, packings: list[Packing], plane: int | None, outer: Any) -> None:
        self.packings, self.plane, self.outer = packings, plane, outer

    def __enter__(self) -> None:
        _graph.push_hooks(self.pack, Saving.unpack)

    def __exit__(self, *error: object) -> None:
        _graph.pop_hooks()
        self.packings = []  # autograd's graph holds both hooks

    def pack(self, tensor: Tensor) -> Any:
        outer, restore = self.outer, _same
        parts: tuple[Tensor, ...] = (tensor,)
        if self.plane is not None and (found := _pooled(tensor, self.plane)):
            parts, restore = found
        for packing in self.packings:
            is_small = tensor.nbytes * _MOST_PARTS < packing.size_in_memory
            if not is_small and packing.describes(tensor):
                parts, restore = packing.parts(tensor), packing.restorer(tensor)
                break
        if restore is _same and outer is None:
            restore = partial(_unchanged, version=tensor._version)
        return outer, parts if outer is None else tuple(map(outer[0], parts)), restore

    @staticmethod
    def unpack(saved: Any) -> Tensor:
        outer, parts, restore = saved
        return restore(*(parts if outer is None else map(outer[1], parts)))


def _pooled(tensor: Tensor, plane: int) -> Any:
    """How a pooling's backward restores its input and its indices."""
    # It is known to read no value of its input on these devices.
    if tensor.is_floating_point() and tensor.device.type in ("cpu", "cuda"):
        options: Any = {"dtype": tensor.dtype, "device": tensor.device}
        return (), partial(torch.empty_strided, tensor.shape, tensor.stride(), **options)
    if tensor.dtype == torch.int64 and plane <= 1 << 15:
        return (tensor.to(torch.int16),), Tensor.long
    return None


_NOTHING = nullcontext()


def saving(known: Iterable[Known], plane: int | None = None) -> Any:
    """The context in which what ``known`` tensors show is saved as their packings."""
    packings = []
    for tensor in known:
        if (packing := tensor.packing()) and packing.is_saved:
            packings.append(packing)
    if (not packings and plane is None) or not torch.is_grad_enabled():
        return _NOTHING
    outer = _graph.saving_hooks()
    is_checkpointed = outer is not None and _graph.are_checkpoints(outer)
    return _NOTHING if is_checkpointed else Saving(packings, plane, outer)


def run_saving(
    known: list[Known], func: Any, args: Any, kwargs: Any, plane: int | None = None
) -> Any:
    """Run an operation while what ``known`` tensors show is saved as their packings."""
    if not _graph.allows_hooks():  # torch.func forbids them
        return func(*args, **kwargs)
    with saving(known, plane):
        return func(*args, **kwargs)


def _same(value: Any) -> Any:
    return value


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    """``tensor``, if it has this ``version`` still; torch checks none that hooks have saved."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a {tensor.dtype} tensor of shape {list(tensor.shape)} is at version "
            f"{tensor._version}; expected version {version} instead"
        )
    return tensor


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
    name: getattr(torch._C.TensorBase, name).__get__
    for name, kind in vars(torch._C.TensorBase).items()
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
    Tensor.tolist: _list,
    **dict.fromkeys(
        [
            *_both("view reshape flatten unflatten transpose swapaxes swapdims permute t"),
            *_both("squeeze unsqueeze detach narrow select chunk split tensor_split unbind"),
            *_both("movedim moveaxis adjoint __getitem__ view_as reshape_as alias contiguous"),
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
    **dict.fromkeys(_both("clone to float half bfloat16 cat concat stack"), _copy),
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
