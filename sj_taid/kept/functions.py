"""What torch's functions do with kept tensors: each handler stands below what it handles."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._internal import graph
from .kept import (
    Kept,
    Memory,
    attach,
    describe,
    expose,
    fills_memory,
    handles,
    kept_in,
    leave,
    run,
    run_plain,
)
from .saving import PackedRecipe, Recipe, recipe_of_counts, run_saving


def _named(names: str) -> list[Any]:
    """The functions of these names, as methods and in torch."""
    found = [getattr(home, name, None) for name in names.split() for home in (Tensor, torch)]
    return [function for function in found if callable(function)]  # torch.half is a dtype


#: the getters of a tensor's attributes, by their names
_GET = {
    name: attribute.__get__
    for name, attribute in vars(graph.TensorBase).items()
    if isinstance(attribute, GetSetDescriptorType)
}

# ---- questions, which read and show no values ----------------------------------------------------


@handles(
    *_GET.values(),  # but those below
    *_named("size stride dim ndimension numel nelement storage_offset element_size get_device"),
    *_named("is_floating_point is_complex is_contiguous is_inference is_signed is_tensor"),
    *_named("type requires_grad_ __len__ is_set_to is_same_size"),
    *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")),
)
def _ask(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


# ---- views and copies ----------------------------------------------------------------------------

#: copies and casts of all values in their order
_COPIES = {*_named("contiguous clone to float half bfloat16")}


@handles(
    *_COPIES,
    *_named("view reshape flatten unflatten transpose swapaxes swapdims permute t"),
    *_named("squeeze unsqueeze detach narrow select chunk split tensor_split unbind"),
    *_named("movedim moveaxis adjoint __getitem__ view_as reshape_as alias"),
    *(_GET["T"], _GET["mT"], _GET["H"], _GET["mH"]),
)
def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """A view, a copy or a cast, which save no values for backward.

    A view may copy, too, in another order, as an index that is a tensor or a list.
    """
    if not args:  # given by name
        return run(func, args, kwargs)
    whole, result = args[0], func(*args, **kwargs)
    if type(whole) is not Kept or result is whole:
        return result
    parts = result if isinstance(result, list | tuple) else [result]
    for part in parts:
        _describe_part(part, whole, func in _COPIES)
    source = whole._source
    place = None if source is None else _find_place(func, args, kwargs, result)
    if place is not None:
        if type(result) is not Kept:
            attach(result, Memory(result), None)
        result._source, result._place = source, place
    elif source is not None and all(getattr(part, "_source", None) is None for part in parts):
        source.note(func)
    return result


def _describe_part(result: Tensor, whole: Kept, keeps_order: bool) -> None:
    """Give a view or copy of ``whole``, or of a part of it, the recipe of what it shows."""
    memory, base, recipe = whole._memory, whole._base, whole._recipe
    if not memory.is_known or type(result) is not Tensor or result.is_inference():
        return
    source, is_same = whole._source, result.dtype == whole.dtype
    if whole.requires_grad and not result.requires_grad:  # detached: keeps no other tensor alive
        source, recipe = None, None if recipe and recipe.holds_others else recipe
    is_view = is_same and result._base is (whole if base is None else base)
    if is_view or graph.shares_memory(result, whole):
        memory.is_known &= is_same  # else other numbers in the same memory
        if is_same:
            attach(result, memory, recipe, source, version=whole._known_version)
    elif recipe and whole.covers(whole):
        # Equal strides alone do not say that values are in the same order.
        is_equal = keeps_order and is_same and result.stride() == whole.stride()
        if is_equal and fills_memory(whole):
            attach(result, Memory(result), recipe)
        else:
            describe(result, (), recipe_of_counts(result, recipe.peak))


def _find_place(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """Where in a norm's input the values of a view or copy lie, or ``None``."""
    whole, *rest = args
    if not (torch.is_grad_enabled() and isinstance(result, Tensor) and result.requires_grad):
        return None
    if result.dtype != whole.dtype or result.numel() != whole.numel():
        return None
    is_known = whole._memory.is_known and whole._version == whole._known_version
    return whole._place.view(func, rest, kwargs) if is_known and whole._place else None


# ---- what autograd does not see ------------------------------------------------------------------

#: steps of optimizers and scalers of gradients, which change no version
_UNSEEN = [
    function
    for name, function in vars(torch).items()
    if name.startswith(("_fused_", "_amp_")) and name.endswith("_")
]
handles(
    *_UNSEEN,
    *(_GET["data"], Tensor.data.__set__, _GET["real"], _GET["imag"], _GET["_base"]),  # type: ignore[attr-defined]
    *(Tensor.data_ptr, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.share_memory_),
    *(Tensor.untyped_storage, Tensor.storage, Tensor.__cuda_array_interface__.__get__),
    *(Tensor.apply_, Tensor.map_, Tensor.map2_),
)(expose)
handles(Tensor.__repr__, Tensor.__format__)(run_plain)


@handles(Tensor.__reduce_ex__)
def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    """A shallow copy, which shares memory, or a pickle, of the plain tensor."""
    args[0]._memory.is_known = False
    return run_plain(func, args, kwargs)


@handles(Tensor.__deepcopy__)
def _deepcopy(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, memo = args
    values = leave(tensor).detach() if tensor.is_leaf else leave(tensor)
    memo.setdefault(id(memo), []).append(values)  # or the next tensor may get its id
    copied = values.__deepcopy__(memo).requires_grad_(tensor.requires_grad)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied


# ---- gradients of a norm's output ----------------------------------------------------------------


def _watch(tensors: Callable[[Any, Any], Any], func: Any, args: Any, kwargs: Any) -> Any:
    """Run what reads the gradient of ``tensors(args, kwargs)``, after a note to their norms."""
    for tensor in kept_in([tensors(args, kwargs)], {}):
        if tensor._place is not None:
            tensor._source.watch()
    return func(*args, **kwargs)


#: who has ``grad_fn`` may register a hook
handles(Tensor.register_hook, Tensor.retain_grad, _GET["grad_fn"])(
    partial(_watch, lambda args, kwargs: args[0])
)
handles(torch.autograd.grad)(partial(_watch, lambda args, kwargs: args[1]))
handles(torch.autograd.backward)(partial(_watch, lambda args, kwargs: kwargs.get("inputs")))
handles(Tensor.backward)(
    partial(_watch, lambda args, kwargs: kwargs.get("inputs", (*args, *[None] * 5)[4]))
)

# ---- operations whose results are counts ---------------------------------------------------------


def peak_of(tensor: Any) -> int | None:
    """An upper bound of values that are known to be whole numbers."""
    recipe = tensor.recipe() if isinstance(tensor, Kept) else None
    return recipe.peak if recipe else None


@handles(*_named("cat concat stack"))
def _join(func: Any, args: Any, kwargs: Any) -> Any:
    is_plain = args and kwargs.keys() <= {"dim"}
    peaks = [peak_of(tensor) for tensor in args[0]] if is_plain else []
    return run(func, args, kwargs, None if None in peaks else max(peaks, default=None))  # type: ignore[type-var]


def _peak_of_product(args: Any, kwargs: Any) -> int | None:
    peaks: Any = [None] if kwargs or len(args) != 2 else [*map(peak_of, args)]
    return None if None in peaks else math.prod(peaks)


@handles(Tensor.__rsub__)
def _subtract(func: Any, args: Any, kwargs: Any) -> Any:
    """``1 - spikes`` are spikes."""
    is_complement = not kwargs and args[1:] == (1,) and peak_of(args[0]) == 1
    return run(func, args, kwargs, 1 if is_complement else None)


def _multiply(operation: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """A product or a quotient, which may be counts times a constant."""
    if kwargs or len(args) != 2 or type(args[1]) not in (int, float):
        peak = _peak_of_product(args, kwargs) if operation is Tensor.mul_ else None
        return run(func, args, kwargs, peak)
    whole, other = args
    recipe: Any = whole.recipe() if type(whole) is Kept else None
    if not (isinstance(recipe, PackedRecipe) and torch.is_grad_enabled() and fills_memory(whole)):
        return run(func, args, kwargs)
    dtype, strides = whole.dtype, whole.stride()
    saved = recipe.saved_of(whole)  # before the multiplication, which may be in place
    scaled = Recipe(partial(_scale, recipe.make, operation, other), saved)
    result = run_saving([whole], func, args, kwargs)
    same = result.dtype == dtype and result.stride() == strides
    describe(result, [whole], scaled if same else None)
    return result


def _scale(make: Callable[..., Tensor], operation: Any, number: float, *saved: Tensor) -> Tensor:
    return operation(make(*saved), number)


handles(*_named("mul multiply __mul__ __rmul__ mul_ __imul__"))(partial(_multiply, Tensor.mul_))
handles(*_named("div divide __truediv__ div_ __itruediv__"))(partial(_multiply, Tensor.div_))


def _pool(dimensions: int, keeps_values: bool, func: Any, args: Any, kwargs: Any) -> Any:
    """A pooling, of whose input the shape alone is read in backward."""
    if not args:
        return run(func, args, kwargs)
    dilation = args[4] if len(args) > 4 else kwargs.get("dilation", 1)
    # A dilated window may lie in the padding, of which nothing is the greatest.
    known = keeps_values and dilation in (1, (1,), (1, 1), (1, 1, 1))
    plane = args[0].shape[-dimensions:].numel()
    peak = peak_of(args[0]) if known else None
    return run(func, args, kwargs, peak, partial(_recipe_of_pooled, plane))


def _recipe_of_pooled(plane: int, tensor: Tensor) -> Recipe | None:
    """The recipes of a pooling's input, and of its indices in planes of so many pixels."""
    # It is known to read no value of its input on these devices.
    if tensor.is_floating_point() and tensor.device.type in ("cpu", "cuda"):
        options: Any = {"dtype": tensor.dtype, "device": tensor.device}
        return Recipe(partial(torch.empty_strided, tensor.shape, tensor.stride(), **options))
    if tensor.dtype == torch.int64 and plane <= 1 << 15:
        return Recipe(Tensor.long, (tensor.to(torch.int16),))
    return None


for kind in ("max", "avg", "adaptive_max", "adaptive_avg"):
    for n in (1, 2, 3):
        names = f"{kind}_pool{n}d", f"{kind}_pool{n}d_with_indices"
        pools = [vars(home)[name] for home in (F, torch) for name in names if name in vars(home)]
        handles(*pools)(partial(_pool, n, "max" in kind))

# ---- operations whose tensors autocast casts -----------------------------------------------------


@handles(
    *_named("addmm baddbmm conv1d conv2d conv3d"),
    *_named("conv_transpose1d conv_transpose2d conv_transpose3d"),
)
def _contract(func: Any, args: Any, kwargs: Any, peak: int | None = None) -> Any:
    if graph.is_autocast_enabled() and sum(isinstance(t, Tensor) for t in args) > 1:
        args = tuple(_lowered(t) if type(t) is Kept else t for t in args)
    return run(func, args, kwargs, peak)


@handles(*_named("matmul __matmul__ bmm mm"))
def _matmul(func: Any, args: Any, kwargs: Any) -> Any:
    """A sum of as many products as heads are wide; four bits hold those of narrow heads."""
    peak = _peak_of_product(args, kwargs)
    return _contract(func, args, kwargs, None if peak is None else peak * args[0].shape[-1])


def _lowered(tensor: Any) -> Any:
    """``tensor``, cast as autocast casts it, with a recipe, which autocast's own has not."""
    device = tensor.device.type
    if tensor.dtype != torch.float32 or tensor.is_meta or not torch.is_autocast_enabled(device):
        return tensor
    return _view(Tensor.to, (tensor, torch.get_autocast_dtype(device)), {})


@handles(F.linear)
def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    """A linear layer of a contiguous copy: its own copy of spikes has no recipe."""
    is_plain = kwargs or type(args[0]) is not Kept or args[0].dim() < 3
    if is_plain or args[0].is_contiguous() or graph.is_autocast_enabled():
        return _contract(func, args, kwargs)
    x, weight, bias = (*args, None)[:3]
    y = _contract(func, (_view(Tensor.contiguous, (x,), {}), weight), {})
    return y if bias is None else y.add_(bias)  # as torch: not within the matrix product
