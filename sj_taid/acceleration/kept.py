"""Tensors that are saved for backward in fewer bytes, because they know how to be made again.

A :class:`Kept` is an ordinary tensor with a :class:`Recipe` of the values in its :class:`Memory`,
which its views share. An operation runs on the plain tensor, with hooks open for that one call that
save what the recipe saves instead of what lies, unchanged, in that memory. Where torch does not
ask, as in a custom ``autograd.Function``, the tensor is saved as it is.

What a function does is said by :data:`HANDLERS`. One that is not there is an operation: if its
result shows the memory of a kept tensor, the values are no longer known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from .._internal import graph
from ..ops import backends, bits

#: A part smaller than one of so many is saved as it is: to make it again, all values would be.
_MOST_PARTS = 16


@dataclass(eq=False)
class Recipe:
    """How all values of a dense tensor are made again, in the same memory order.

    Attributes:
        make: makes them of what is ``saved``.
        peak: an upper bound of the values if all are whole numbers >= 0, else ``None``.
        cost: passes over the values to make them.
        references: how many of the saved tensors are others, which it keeps in memory.
        is_saved: whether every operation saves it; else sums alone do.
        holds_others: whether it keeps other tensors alive, which what is detached must not.
    """

    make: Callable[..., Tensor]
    saved: tuple[Tensor, ...] = ()
    peak: int | None = None
    cost: int = 1
    references: int = 0
    is_saved: bool = True
    holds_others: bool = False

    def saved_of(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """What is saved of ``tensor``, which shows these values, all or some."""
        return self.saved

    def of(self, tensor: Tensor) -> Recipe | None:
        """The recipe of ``tensor`` itself."""
        view = tensor.shape, tensor.stride(), tensor.storage_offset()
        make = partial(_make_view, self.make, view)
        return Recipe(make, self.saved_of(tensor), self.peak, self.cost, self.references)


def _make_view(make: Callable[..., Tensor], view: Any, *saved: Tensor) -> Tensor:
    return make(*saved).as_strided(*view)


class Counts(Recipe):
    """Whole numbers up to 15: spikes, saved as bits, and counts, saved as four bits."""

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


def counts_of(tensor: Tensor, peak: int | None) -> Counts | None:
    """The recipe of whole numbers up to ``peak``, if four bits hold them."""
    return None if peak is None or peak > bits.LARGEST_COUNT else Counts(tensor, peak)


def unchanged(tensor: Tensor, version: int) -> Tensor:
    """``tensor``, if it has this ``version`` still; torch checks none that hooks have saved."""
    if (now := graph.version_of(tensor)) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a {tensor.dtype} tensor of shape {list(tensor.shape)} is at version "
            f"{now}; expected version {version} instead. Change a copy, as h = h + o instead of "
            "h += o, or sj_taid.unaccelerate(net)"
        )
    return tensor


class Memory:
    """The memory of a dense tensor. All kept tensors in it share this, and so what is known."""

    __slots__ = ("address", "is_captured", "is_known", "nbytes")

    def __init__(self, tensor: Tensor) -> None:
        self.address, self.nbytes = tensor.data_ptr(), tensor.nbytes
        # The replays of a CUDA graph change values unseen.
        self.is_captured = graph.is_capturing(tensor)
        #: until something changes it, or may, that autograd does not see
        self.is_known = True


class Kept(Tensor):
    """A tensor that says how it is saved, and of a norm's output from what a neuron computes it."""

    _memory: Memory
    #: how the values of the whole memory are made again, at this version of the memory
    _recipe: Recipe | None
    _known_version: int
    #: of a norm's output, its views and copies: what a neuron takes instead
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


def keep(
    tensor: Any,
    memory: Memory,
    recipe: Recipe | None,
    source: Any = None,
    place: Any = None,
    version: int | None = None,
) -> Tensor:
    """Let a plain ``tensor``, or one that has changed, know what it is."""
    tensor._known_version = tensor._version if version is None else version
    tensor.__class__ = Kept
    tensor._memory, tensor._recipe = memory, recipe
    tensor._source, tensor._place = source, place
    return tensor


# ---- what functions do ---------------------------------------------------------------------------


def _handle(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for kind in types:
        if kind is not Kept and kind is not Tensor and not issubclass(kind, Kept):
            return _leave(func, args, kwargs)  # another's subclass, which decides itself
    with graph.plain_functions():
        return HANDLERS.get(func, _operate)(func, args, kwargs)


#: the same while a graph of torch.compile runs or is traced, which breaks there
_handle_apart = graph.outside_graphs(_handle)


def _leave(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a function on plain tensors."""
    args, kwargs = tree_map_only(Kept, leave, (args, kwargs))
    return func(*args, **kwargs)


@graph.outside_graphs
def leave(tensor: Kept) -> Tensor:
    """A kept tensor as a plain one."""
    with graph.plain_functions():
        return tensor.as_subclass(Tensor)


def _ask(func: Any, args: Any, kwargs: Any) -> Any:
    """A question about a tensor, which reads and shows no values."""
    return func(*args, **kwargs)


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """A view, a copy or a cast, which save no values for backward."""
    result = func(*args, **kwargs)
    whole = args[0] if args else None
    if type(whole) is not Kept or result is whole:
        return result
    parts = result if isinstance(result, list | tuple) else [result]
    for part in parts:
        _describe_view(part, whole)
    source = whole._source
    place = None if source is None else _find_place(func, args, kwargs, result)
    if place is not None:
        if type(result) is not Kept:
            keep(result, Memory(result), None)
        result._source, result._place = source, place
    elif source is not None and all(getattr(part, "_source", None) is None for part in parts):
        source.note(func)
    return result


def _describe_view(result: Tensor, whole: Kept) -> None:
    """Let a view of ``whole``, or a copy, know what it shows."""
    memory, base, recipe = whole._memory, whole._base, whole._recipe
    if not memory.is_known or type(result) is not Tensor or result.is_inference():
        return
    holds_others = whole._source is not None or (recipe and recipe.holds_others)
    may_hold = result.requires_grad or not holds_others
    is_same = result.dtype == whole.dtype
    is_view = is_same and result._base is (whole if base is None else base)
    if is_view or graph.shares_memory(result, whole):
        if not is_same:
            memory.is_known = False  # other numbers in the same memory
        elif may_hold or not whole.requires_grad:
            keep(result, memory, recipe, whole._source, version=whole._known_version)
        else:
            keep(result, memory, None, version=whole._known_version)
    elif recipe and whole.covers(whole):
        is_same = is_same and result.stride() == whole.stride()
        if is_same and may_hold and _fills_memory(whole):
            keep(result, Memory(result), recipe)
        else:
            describe(result, (), counts_of(result, recipe.peak))


def _find_place(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """Where in a norm's input the values of a view or copy lie, or ``None``."""
    whole, *rest = args
    if not (torch.is_grad_enabled() and isinstance(result, Tensor) and result.requires_grad):
        return None
    if result.dtype != whole.dtype or result.numel() != whole.numel():
        return None
    is_known = whole._memory.is_known and whole._version == whole._known_version
    return whole._place.view(func, rest, kwargs) if is_known and whole._place else None


def _expose(func: Any, args: Any, kwargs: Any) -> Any:
    """Access to memory that autograd does not see, so that the values are no longer known."""
    for tensor in kept_in(args, kwargs, func):
        tensor._memory.is_known = False
    return func(*args, **kwargs)


def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    """A shallow copy, which shares memory, or a pickle: those of a plain tensor."""
    args[0]._memory.is_known = False
    return _leave(func, args, kwargs)


def _deepcopy(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, memo = args
    values = leave(tensor).detach() if tensor.is_leaf else leave(tensor)
    memo.setdefault(id(memo), []).append(values)  # or the next tensor may get its id
    copied = values.__deepcopy__(memo).requires_grad_(tensor.requires_grad)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied


def _watch(tensors: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """The handler of a function that takes the gradient of ``tensors(args, kwargs)``."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        for tensor in kept_in([tensors(args, kwargs)], {}):
            if tensor._place is not None:
                tensor._source.watch()
        return func(*args, **kwargs)

    return handle


def _operate(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on values, which may save them."""
    if getattr(func, "__module__", None) == "torch.distributed.distributed_c10d":
        return _expose(func, args, kwargs)
    return _run(func, args, kwargs)


def _contract(func: Any, args: Any, kwargs: Any, peak: int | None = None) -> Any:
    """An operation whose tensors autocast casts."""
    if graph.is_autocast_enabled() and sum(isinstance(t, Tensor) for t in args) > 1:
        args = tuple(_lowered(t) if type(t) is Kept else t for t in args)
    return _run(func, args, kwargs, peak)


def _matmul(func: Any, args: Any, kwargs: Any) -> Any:
    peak = _peak_of_product(args, kwargs)
    return _contract(func, args, kwargs, None if peak is None else peak * args[0].shape[-1])


def _lowered(tensor: Any) -> Any:
    """``tensor`` as autocast would cast it, which would save a tensor that nobody knows."""
    device = tensor.device.type
    if tensor.dtype != torch.float32 or tensor.is_meta or not torch.is_autocast_enabled(device):
        return tensor
    return _view(Tensor.to, (tensor, torch.get_autocast_dtype(device)), {})


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    """A linear layer, which would save a copy of spikes that are not contiguous."""
    is_plain = kwargs or type(args[0]) is not Kept or args[0].dim() < 3
    if is_plain or args[0].is_contiguous() or graph.is_autocast_enabled():
        return _contract(func, args, kwargs)
    x, weight, bias = (*args, None)[:3]
    y = _contract(func, (_view(Tensor.contiguous, (x,), {}), weight), {})
    return y if bias is None else y.add_(bias)  # as torch: not within the matrix product


def _join(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation that only copies values, so that counts stay counts."""
    is_plain = args and kwargs.keys() <= {"dim"}
    peaks = [peak_of(tensor) for tensor in args[0]] if is_plain else []
    return _run(func, args, kwargs, None if None in peaks else max(peaks, default=None))  # type: ignore[type-var]


def _pool(dimensions: int, keeps_values: bool) -> Callable[..., Any]:
    """The handler of a pooling, of whose input the shape alone is read in backward."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        dilation = args[4] if len(args) > 4 else kwargs.get("dilation", 1)
        # A dilated window may lie in the padding, of which nothing is the greatest.
        known = keeps_values and dilation in (1, (1,), (1, 1), (1, 1, 1))
        plane = args[0].shape[-dimensions:].numel() if args else None
        return _run(func, args, kwargs, peak_of(args[0]) if known and args else None, plane)

    return handle


def _multiply(in_place: Any) -> Callable[..., Any]:
    """The handler of a product or a quotient, which may be one with a constant."""

    def handle(func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs or len(args) != 2 or type(args[1]) not in (int, float):
            peak = _peak_of_product(args, kwargs) if in_place is Tensor.mul_ else None
            return _run(func, args, kwargs, peak)
        whole, other = args
        recipe: Any = whole.recipe() if type(whole) is Kept else None
        if not (isinstance(recipe, Counts) and torch.is_grad_enabled() and _fills_memory(whole)):
            return _run(func, args, kwargs)
        dtype, strides = whole.dtype, whole.stride()
        saved = recipe.saved_of(whole)  # before the multiplication, which may be in place
        scaled = Recipe(partial(_scale, recipe.make, in_place, other), saved)
        result = run_saving([whole], func, args, kwargs)
        same = result.dtype == dtype and result.stride() == strides
        describe(result, [whole], scaled if same else None)
        return result

    return handle


def _scale(make: Callable[..., Tensor], in_place: Any, number: float, *saved: Tensor) -> Tensor:
    return in_place(make(*saved), number)


def _subtract(func: Any, args: Any, kwargs: Any) -> Any:
    """``1 - spikes`` are spikes."""
    is_complement = not kwargs and args[1:] == (1,) and peak_of(args[0]) == 1
    return _run(func, args, kwargs, 1 if is_complement else None)


def _run(
    func: Any, args: Any, kwargs: Any, peak: int | None = None, plane: int | None = None
) -> Any:
    """Run an operation with hooks open; ``peak``: its results are whole numbers up to that."""
    kept = kept_in(args, kwargs, func)
    result = run_saving(kept, func, args, kwargs, plane)
    for tensor in result if isinstance(result, list | tuple) else [result]:
        if isinstance(tensor, Tensor):
            describe(tensor, kept, counts_of(tensor, peak))
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


def _peak_of_product(args: Any, kwargs: Any) -> int | None:
    peaks: Any = [peak_of(factor) for factor in args]
    return None if kwargs or len(peaks) != 2 or None in peaks else math.prod(peaks)


def peak_of(tensor: Any) -> int | None:
    recipe = tensor.recipe() if isinstance(tensor, Kept) else None
    return recipe.peak if recipe else None


def describe(result: Tensor, kept: Iterable[Any], recipe: Recipe | None) -> None:
    """Let the result of an operation on ``kept`` tensors know its recipe."""
    if result.is_inference():
        return
    for tensor in kept:
        if tensor is not result and graph.shares_memory(result, tensor):
            tensor._memory.is_known = False  # shown by a function that is no view
    if recipe is not None and result.is_floating_point() and _fills_memory(result):
        keep(result, result._memory if type(result) is Kept else Memory(result), recipe)


def _fills_memory(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory, in any order."""
    if not graph.address_of(tensor):  # a wrapper of torch.func
        return False
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.storage_offset() == 0
    if not whole or tensor.is_contiguous():
        return whole
    return tensor.stride() == torch.empty_like(tensor, device="meta").stride()


# ---- what is saved -------------------------------------------------------------------------------


def run_saving(
    kept: Sequence[Kept], func: Any, args: Any, kwargs: Any, plane: int | None = None
) -> Any:
    """Run an operation while what ``kept`` tensors show is saved as their recipes say.

    ``plane``: of pooling, how many pixels a plane has. Of its input the shape alone is saved, and
    indices into at most 32,768 pixels in 16 bits instead of 64.
    """
    # A norm's output is saved detached, without its source, which holds the norm's input.
    known = [t for t in kept if t._recipe or t._source is not None] if kept else []
    is_saving = (known or plane is not None) and torch.is_grad_enabled()
    if not is_saving or not graph.allows_hooks():  # torch.func forbids them
        return func(*args, **kwargs)
    outer = graph.saving_hooks()
    if outer is not None and graph.are_checkpoints(outer):
        return func(*args, **kwargs)
    # While they are open they hold what is known, so what lies at its addresses is its own.
    pack = partial(_pack, known, plane, outer)
    # An interrupt may come right after any call: opened within, and first; closed first.
    try:
        graph.push_hooks(pack, _unpack)
        return func(*args, **kwargs)
    finally:
        del known[:]  # autograd's graph holds both hooks
        graph.pop_hooks()


def _pack(known: list[Kept], plane: int | None, outer: Any, tensor: Tensor) -> Any:
    """What is saved of a tensor: a function, its arguments, and how other hooks unpack these."""
    recipe = None if plane is None else _pooled(tensor, plane)
    for whole in known if recipe is None else ():
        is_much = tensor.nbytes * _MOST_PARTS >= whole._memory.nbytes
        if is_much and whole._recipe and whole._recipe.is_saved and whole.covers(tensor):
            recipe = whole._recipe.of(tensor)
            break
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


def _pooled(tensor: Tensor, plane: int) -> Recipe | None:
    """How a pooling's backward makes its input and its indices again."""
    # It is known to read no value of its input on these devices.
    if tensor.is_floating_point() and tensor.device.type in ("cpu", "cuda"):
        options: Any = {"dtype": tensor.dtype, "device": tensor.device}
        return Recipe(partial(torch.empty_strided, tensor.shape, tensor.stride(), **options))
    if tensor.dtype == torch.int64 and plane <= 1 << 15:
        return Recipe(Tensor.long, (tensor.to(torch.int16),))
    return None


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
_GRAD_FN = _ATTRIBUTES.pop("grad_fn")  # who has the node may register a hook
#: A function of torch -> the function that handles it; another one is :func:`_operate`.
HANDLERS: dict[Any, Callable[..., Any]] = {
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
            Tensor.__cuda_array_interface__.__get__,
            Tensor.share_memory_,
            *(Tensor.apply_, Tensor.map_, Tensor.map2_),
        ],
        _expose,
    ),
    **dict.fromkeys(
        [Tensor.register_hook, Tensor.retain_grad, _GRAD_FN], _watch(lambda args, kwargs: args[0])
    ),
    Tensor.backward: _watch(lambda args, kwargs: kwargs.get("inputs", (*args, *[None] * 5)[4])),
    torch.autograd.grad: _watch(lambda args, kwargs: args[1]),
    torch.autograd.backward: _watch(lambda args, kwargs: kwargs.get("inputs")),
    **dict.fromkeys(_both("cat concat stack"), _join),
    **_POOLS,
    **dict.fromkeys(_both("mul multiply __mul__ __rmul__ mul_ __imul__"), _multiply(Tensor.mul_)),
    **dict.fromkeys(_both("div divide __truediv__ div_ __itruediv__"), _multiply(Tensor.div_)),
    **dict.fromkeys(
        [
            *(torch.einsum, *_both("addmm baddbmm conv1d conv2d conv3d")),
            *_both("conv_transpose1d conv_transpose2d conv_transpose3d"),
        ],
        _contract,
    ),
    **dict.fromkeys(_both("matmul __matmul__ bmm mm"), _matmul),
    F.linear: _linear,
    Tensor.__rsub__: _subtract,
    **dict.fromkeys([Tensor.__repr__, Tensor.__format__], _leave),
    Tensor.__reduce_ex__: _copy,
    Tensor.__deepcopy__: _deepcopy,
}
