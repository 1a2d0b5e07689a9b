"""Tensors that are saved for backward in fewer bytes, because they know how to be restored.

A :class:`Compact` is an ordinary tensor with a :class:`Packing`. Its views are compact too. An
operation on it runs on the plain tensor, with ``saved_tensors_hooks`` open for that one call, which
save the packing instead of what lies, unchanged, in the tensor's memory. Where torch does not ask,
as in a custom ``autograd.Function``, the tensor is saved as it is.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from .. import _graph
from ..ops.bits import pack, unpack_into

#: the largest whole number that one byte holds
_LARGEST = 255
#: how many tensors a sum may be computed again from
_MOST_TERMS = 4
#: A part smaller than one of so many is saved as it is: to restore it, all values would be.
_MOST_PARTS = 16

#: They give access to memory that autograd does not see, so the values are no longer known.
_EXPOSES = {
    *(Tensor.data.__get__, Tensor.data.__set__, Tensor.data_ptr, Tensor.numpy),  # type: ignore[attr-defined]
    *(Tensor.untyped_storage, Tensor.storage, Tensor.__dlpack__, Tensor.__array__, Tensor.tolist),
    Tensor.share_memory_,
    *(Tensor.apply_, Tensor.map_, Tensor.map2_),
}
#: the module whose functions change memory that autograd does not see
_COLLECTIVES = "torch.distributed.distributed_c10d"
#: They take the gradient of tensors: the position of that argument; ``None``: it is ``inputs``.
_GRADIENTS: dict[Any, int | None] = {
    **{Tensor.register_hook: 0, Tensor.retain_grad: 0},
    **{torch.autograd.grad: 1, torch.autograd.backward: None},
}
#: Their result has no value that their inputs do not have.
_COPIES = {
    *("clone", "contiguous", "reshape", "flatten", "to", "float", "half", "bfloat16"),
    *("cat", "concat", "stack", "max_pool1d", "max_pool2d", "max_pool3d"),
}
#: options that leave the largest value of a result known
_OPTIONS = {"dim", "stride", "padding", "dilation", "ceil_mode", "return_indices"}
_ADDS_IN_PLACE = {"add_", "__iadd__"}
_ADDS = _ADDS_IN_PLACE | {"add", "__add__", "__radd__"}
_MULTIPLIES = {"mul", "multiply", "__mul__", "__rmul__", "mul_", "__imul__"}
_CONTRACTS = {"matmul", "__matmul__", "bmm", "mm"}
#: of two tensors and more, autocast casts them
_LOWERS = _CONTRACTS | {
    *("linear", "conv1d", "conv2d", "conv3d", "einsum", "addmm", "baddbmm"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
#: their backward reads the shape of the input, not its values
_POOLS = {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)}


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
    #: what to save of a tensor that shows these values
    parts: Callable[[Tensor], tuple[Tensor, ...]]
    #: all the values of these parts, in a tensor of the same memory order
    restore: Callable[..., Tensor]

    def __init__(self, tensor: Tensor) -> None:
        self.address, self.version = _graph.address_of(tensor), tensor._version
        self.dtype, self.is_known = tensor.dtype, True
        self._captured = _graph.is_capturing(tensor)

    def describes(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` shows these values, all or some, unchanged."""
        return self.is_known and self.shares_memory(tensor)

    def shares_memory(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is in the same memory, in which nothing has changed."""
        return (
            tensor._version == self.version
            and tensor.dtype == self.dtype
            and _graph.address_of(tensor) == self.address
            and self._captured == _graph.is_capturing(tensor)  # or a replay may have changed it
        )

    def expose(self) -> None:
        """Know the values no longer."""
        self.is_known = False

    def term(self, tensor: Tensor) -> Term:
        """``tensor``, which shows these values, as a term of a sum."""
        view = (tensor.shape, tensor.stride(), tensor.storage_offset())

        def restore(*parts: Tensor) -> Tensor:
            return self.restore(*parts).as_strided(*view)

        return Term(self.parts(tensor), restore, self.size, self.peak, self.references)


class Counts(Packing):
    """Spikes, saved as bits, and whole numbers up to 255, saved as bytes."""

    def __init__(self, tensor: Tensor, peak: int = 1, bits: Tensor | None = None) -> None:
        super().__init__(tensor)
        self.peak, self._numel, self._saved = peak, tensor.numel(), bits
        self._steps = math.gcd(self._numel, 8) if bits is None else len(tensor)

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if self._saved is None:
            values = tensor.detach().as_strided((self._numel,), (1,), 0)
            is_spikes = self.peak == 1
            self._saved = pack(values.view(self._steps, -1)) if is_spikes else values.byte()
        return (self._saved,)

    def restore(self, *parts: Tensor) -> Tensor:
        (saved,) = parts
        if self.peak != 1:
            return saved.to(self.dtype)
        spikes = torch.empty(self._numel, dtype=self.dtype, device=saved.device)
        unpack_into(saved, spikes.view(self._steps, -1))
        return spikes


class Sum(Packing):
    """A sum of two tensors."""

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


class Detached(Packing):
    """The packing of what is detached from a sum: it keeps no terms, so its values are unknown."""

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
        return self._packing if self._packing.describes(self) else None

    def learn(self, packing: Packing) -> None:
        """Take the packing of values that have changed in place."""
        self._packing = packing

    def memory(self) -> Tensor:
        """The tensor that holds the values."""
        return self

    def term(self) -> Term | None:
        """The tensor as a term of a sum, if its values are known."""
        packing = self.packing()
        return packing.term(self) if packing else None

    def exposed(self) -> Tensor:
        """The tensor for an operation that hands out its memory."""
        self._packing.expose()
        return self

    def plain(self, reader: str) -> Tensor:
        """A tensor of no class of its own, for ``reader``."""
        return self.as_subclass(Tensor)

    def watch(self) -> None:
        """Prepare for a gradient of its own, or for a hook that takes one."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # as a plain tensor
        with torch._C.DisableTorchFunctionSubclass():
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
    @torch._disable_dynamo
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        # A subclass of someone else's decides itself.
        if not all(kind is Tensor or issubclass(kind, Known) for kind in types):
            with torch._C.DisableTorchFunctionSubclass():
                args, kwargs = tree_map_only(Known, lambda t: t.plain(name), (args, kwargs))
            return func(*args, **kwargs)
        if name in _LOWERS and sum(isinstance(t, Tensor) for t in args) > 1:
            args = tuple(_lowered(t) if isinstance(t, Compact) else t for t in args)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _EXPOSES or getattr(func, "__module__", None) == _COLLECTIVES:
                args, kwargs = tree_map_only(Known, lambda t: t.exposed(), (args, kwargs))
                return func(*args, **kwargs)
            if func in _GRADIENTS:
                at = _GRADIENTS[func]
                for tensor in _flat([kwargs.get("inputs") if at is None else args[at]]):
                    if isinstance(tensor, Known):
                        tensor.watch()
                return func(*args, **kwargs)
            if name == "__get__" or torch.compiler.is_compiling() or not _graph.allows_hooks():
                return func(*args, **kwargs)
            tensors = [t for t in _flat((*args, *kwargs.values())) if isinstance(t, Tensor)]
            known = [t for t in tensors if isinstance(t, Known)]
            # Options, such as alpha of an addition, may change what the result is.
            peak = _peak_of(name, args, kwargs, tensors) if kwargs.keys() <= _OPTIONS else None
            terms = () if kwargs else _terms(name, args)
            plane = tensors[0].shape[-int(name[-2]) :].numel() if name in _POOLS else None
            with saving(known, plane):
                result = func(*args, **kwargs)
            for tensor in _flat([result]):
                if isinstance(tensor, Tensor):
                    _describe(tensor, known, peak, terms)
            return result


class Compact(Known):
    """A tensor with memory and a packing."""


def compact(tensor: Tensor, packing: Packing) -> Tensor:
    """Let a plain ``tensor`` know its packing."""
    tensor.__class__ = Compact
    tensor._packing = packing  # type: ignore[attr-defined]
    return tensor


@contextmanager
def saving(known: Iterable[Known], plane: int | None = None) -> Iterator[None]:
    """Save what ``known`` tensors show as their packings, until the end of ``with``.

    ``plane``: of pooling, how many pixels a plane has. Of its input the shape alone is saved, and
    indices into at most 32,768 pixels in 16 bits instead of 64.
    """
    packings = [packing for tensor in known if (packing := tensor.packing())]
    pools = plane is not None
    if not (packings or pools) or not torch.is_grad_enabled() or _graph.is_checkpointed():
        yield
        return
    outer_pack, outer_unpack = _graph.saving_hooks() or (_same, _same)

    def pack_saved(tensor: Tensor) -> Any:
        # Pooling's backward is known to read no value of its input on these devices.
        if pools and tensor.is_floating_point() and tensor.device.type in ("cpu", "cuda"):
            form = (tensor.shape, tensor.stride())
            options: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}
            return (), partial(torch.empty_strided, *form, **options)
        if plane is not None and tensor.dtype == torch.int64 and plane <= 1 << 15:
            return (outer_pack(tensor.to(torch.int16)),), Tensor.long
        for packing in packings:
            if packing.describes(tensor) and not _is_small_part(tensor):
                term = packing.term(tensor)
                return tuple(map(outer_pack, term.parts)), term.restore
        return (outer_pack(tensor),), _same

    def unpack_saved(saved: Any) -> Tensor:
        parts, restore = saved
        return restore(*map(outer_unpack, parts))

    try:
        with saved_tensors_hooks(pack_saved, unpack_saved):
            yield
    finally:
        packings.clear()  # autograd's graph holds both hooks


def _is_small_part(tensor: Tensor) -> bool:
    return tensor.nbytes * _MOST_PARTS < tensor.untyped_storage().nbytes()


def _same(value: Any) -> Any:
    return value


def _flat(values: Iterable[Any]) -> list[Any]:
    """The values, and those of lists and tuples among them."""
    return [v for value in values for v in (value if isinstance(value, list | tuple) else [value])]


def _lowered(tensor: Any) -> Any:
    """``tensor`` as autocast would cast it, which would save a tensor that nobody knows."""
    device = tensor.device.type
    if tensor.dtype != torch.float32 or tensor.is_meta or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _peak(tensor: Any) -> int | None:
    packing = tensor.packing() if isinstance(tensor, Known) else None
    return packing.peak if packing else None


def _peak_of(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
) -> int | None:
    """The largest value of an operation's result, if all are whole numbers from 0."""
    peaks = [peak for tensor in tensors if (peak := _peak(tensor)) is not None]
    if not peaks or len(peaks) < len(tensors):
        return None
    # A dilated window may lie in the padding, of which nothing is the greatest.
    dilations = (*args[4:5], kwargs.get("dilation", 1))
    dilated = "max_pool" in name and any(d not in (1, (1,), (1, 1), (1, 1, 1)) for d in dilations)
    if name in _COPIES and not dilated:
        return max(peaks)
    if name == "__rsub__" and peaks == [1] and args[1:] == (1,):
        return 1  # the complement of spikes
    if len(peaks) != 2 or len(args) != 2:
        return None
    first, second = peaks
    if name in _ADDS:
        return first + second
    if name in _MULTIPLIES:
        return first * second
    return first * second * args[0].shape[-1] if name in _CONTRACTS else None


def _terms(name: str, args: tuple[Any, ...]) -> tuple[Term, ...]:
    """The two terms of a sum, taken before an addition in place changes one; none of other calls.

    A tensor that is not known, or is the sum of too many, is a term that stays in memory: one at
    most, since two take more than their sum, and none that may change, as one outside the graph.
    """
    is_sum = name in _ADDS and len(args) == 2
    if not is_sum or not torch.is_grad_enabled() or _graph.has_other_hooks():
        return ()
    if not all(isinstance(t, Tensor) for t in args) or _form(args[0]) != _form(args[1]):
        return ()
    terms = [t.term() if isinstance(t, Known) else None for t in args]
    if sum(term.size if term else 1 for term in terms) > _MOST_TERMS:
        terms = [term if term and term.size == 1 else None for term in terms]
    if terms[0] is None and name in _ADDS_IN_PLACE:
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
                "a term of a sum that an accelerated neuron reads was changed in place before the "
                "backward: write h = h + o instead of h += o, or sj_taid.unaccelerate(net)"
            )
        return value

    return Term((values,), restore, references=1)


def _describe(
    result: Tensor, known: list[Known], peak: int | None, terms: tuple[Term, ...]
) -> None:
    """Let the result of an operation know how it is saved."""
    if result.is_inference() or not result.is_floating_point():
        return
    for tensor in known:
        if isinstance(tensor, Compact) and tensor._packing.shares_memory(result):  # a view
            packing = tensor._packing
            if packing.size > 1 and tensor.requires_grad and not result.requires_grad:
                packing = Detached(result, packing)
            if not isinstance(result, Known):
                compact(result, packing)
            return
    if not terms and (peak is None or peak > _LARGEST):
        return
    memory = result.memory() if isinstance(result, Known) else result
    if not _fills_memory(memory):
        return
    packing = Sum(memory, *terms) if terms else Counts(memory, peak or 0)
    result.learn(packing) if isinstance(result, Known) else compact(result, packing)


def _fills_memory(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory, in any order."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.storage_offset() == 0
    return whole and tensor.stride() == torch.empty_like(tensor, device="meta").stride()
