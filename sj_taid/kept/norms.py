"""Batch norms: torch's, or in training the engine's own, whose output says how it is computed.

A norm's output is a real tensor with torch's gradient. Its :class:`Source` has the norm's input and
numbers, which a neuron on the fused operator takes instead: then nobody saves the output. A
:class:`Place` says where the values of the output, or of a view, lie in that input.
"""

from __future__ import annotations

from functools import partial
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from .._internal import graph
from ..ops import backends, bits
from ..ops.bits import is_dense
from ..ops.step.plan import Plans, Spec, arranged
from ..ops.step.program import Reading
from .kept import Kept, Memory, attach
from .saving import Recipe, unchanged


class Place:
    """Where the values of a norm's output, or of a view or copy of it, lie in the norm's input.

    ``at`` is a tensor without memory that has the input's strides, and of which views are taken as
    of the output.
    """

    def __init__(self, at: Tensor, channels: int, inner: int, about: Any) -> None:
        """``inner``: neighbours in memory of one channel; ``about``: dtype and device."""
        self.at, self.channels, self.inner, self.about = at, channels, inner, about
        #: the engine's own batch norm in training
        self.own: Any = None
        self._views = Plans()
        (steps, *_), (time, *_) = at.shape, at.stride()
        neurons = at.numel() // steps
        outermost = at.numel() % steps == 0 and (steps == 1 or time == neurons)
        # Else a step has some channels alone, as where time was made of them.
        outermost &= channels == 1 or neurons % (channels * inner) == 0
        axis = at.shape[2:3], at.stride()[2:3]
        #: why no neuron takes the input instead: any, and one with parameters per channel
        self.why_not_fused = "" if outermost else "time is not the outermost axis in memory"
        matches = axis == ((channels,), (inner,))
        self.why_not_fused_by_channel = self.why_not_fused or (
            "" if matches else "its channels are not those of the norm"
        )

    def view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Place | None:
        """The place of what ``func`` makes of a tensor; ``None`` for a part, or another order."""
        if func in _COPIES:
            return self
        if func is Tensor.__getitem__:
            return None
        key = (func, *map(_hashable, args), *kwargs, *map(_hashable, kwargs.values()))
        for part in key:
            if isinstance(part, Tensor):  # whose shape may change
                return None
        found = self._views.get(key, self)
        if found is self:
            found = self._views.store(key, self._view(func, args, kwargs))
        return found

    def _view(self, func: Any, args: Any, kwargs: Any) -> Place | None:
        try:
            at = func(self.at, *args, **kwargs)
        except RuntimeError:  # no view in the input's memory order
            return None
        if not graph.is_one_storage(at, self.at) or at.numel() != self.at.numel() or at.dim() == 0:
            return None
        return Place(at, self.channels, self.inner, self.about)

    def spec(self, reading: Reading, fixed: bool, *flags: bool) -> Spec:
        """The spec of a neuron that takes the norm's input."""
        dtype, device = self.about
        steps, neurons = self.at.shape[0], self.at.numel() // self.at.shape[0]
        inner = self.inner if self.channels > 1 else neurons
        layout: Any = self.channels, inner, tuple(self.at.shape), self.at.stride()
        about: Any = (reading, dtype, device, steps, neurons, *layout, True, fixed)
        return Spec(*about, *flags)


_COPIES = {Tensor.contiguous, Tensor.clone, torch.clone}


def _hashable(value: Any) -> Any:
    """An argument of a view; sizes and axes as they are now, since tensors among them change."""
    return tuple(map(index, value)) if isinstance(value, list | tuple) else value


class Source:
    """What a neuron takes instead of a norm's output: the norm's input, weight, bias and numbers.

    ``rstd`` is ``(var + eps)^(-1/2)``; ``running`` are the mean and the variance if these are the
    norm's numbers (``fixed``), not the batch's.
    """

    is_watched = False
    #: whether the engine's own norm has made the output
    is_own = False

    def __init__(
        self, x: Tensor, weight: Any, bias: Any, mean: Any, rstd: Any, running: Any, eps: float
    ) -> None:
        self.x, self.weight, self.bias, self.mean, self.rstd = x, weight, bias, mean, rstd
        self.running, self.fixed, self.eps = running, running is not None, eps
        #: what has read the output, and whether it has taken this instead
        self.readers: dict[str, bool] = {}
        self._state, self._hooks = self._now(), graph.saving_hooks()

    def _now(self) -> tuple[Any, ...]:
        """What must be as it was at the norm's call; ``t.data = other`` changes no version."""
        x, weight, bias = self.x, self.weight, self.bias
        return (
            (x._version, x.requires_grad, x.data_ptr()),
            weight is None or (weight._version, weight.requires_grad, weight.data_ptr()),
            bias is None or (bias._version, bias.requires_grad, bias.data_ptr()),
        )

    def note(self, reader: Any) -> None:
        """Note a function that reads the output."""
        name = getattr(reader, "__name__", type(reader).__name__)
        self.readers.setdefault(name.strip("_"), False)  # a neuron may be called like a function

    def watch(self) -> None:
        """Note that something takes the output's gradient, which must pass through it."""
        if any(self.readers.values()):
            raise RuntimeError(
                "a neuron has read this norm's output as one operation with the norm, and no "
                "gradient will reach it: register the hook, or call retain_grad(), before the "
                "neuron runs, or sj_taid.unaccelerate(net)"
            )
        self.is_watched = True

    def tensors(self) -> tuple[Any, ...]:
        """Input, weight, bias, and float32 mean and ``(var + eps)^(-1/2)``."""
        mean, rstd = self.mean, self.rstd
        if mean.dtype != torch.float32:
            mean, rstd = mean.float(), rstd.float()
        return self.x, self.weight, self.bias, mean, rstd

    def why_not_fused(self) -> str:
        """Why a neuron reads the output's values instead, or ""."""
        if self.is_watched:
            return "a hook takes its gradient"
        if self._now() != self._state:
            return "its input or parameters have changed since"
        # Hooks around the checkpoint may give its recomputation the values.
        hooks = graph.saving_hooks()
        if self._hooks != hooks and graph.are_checkpoints(hooks):
            return "gradient checkpointing begins between them"
        return ""


def reader_of(node: Any) -> str:
    """What a report calls a neuron."""
    return node._taid_name or type(node).__name__


def find_source(y: Kept, node: Any, per_channel: bool) -> Source | None:
    """What a neuron takes instead of ``y``, or ``None``: then it reads the values.

    ``per_channel``: whether it has parameters for each channel.
    """
    source, place, memory = y._source, y._place, y._memory
    if not y.requires_grad:  # as after detach_()
        return None
    reason = place.why_not_fused_by_channel if per_channel else place.why_not_fused
    is_known = memory.is_known and y._version == y._known_version
    if not reason and not (is_known and (not y.is_cuda or y.covers(y))):
        reason = "its values may have changed"
    if node._backward_hooks and not node._is_full_backward_hook:
        reason = "a hook of the neuron reads its graph"
    if reason := reason or source.why_not_fused():
        source.readers[f"{reader_of(node)}: {reason}"] = False
        return None
    return source


class Normalized(Recipe):
    """The output of a norm: a sum keeps it as the norm's input, which backward keeps anyway.

    All else saves it as it is, or not at all.
    """

    is_saved, holds_others = False, True

    def __init__(self, source: Source, folds: bool) -> None:
        self._source, self._folds = source, folds

    def of(self, tensor: Tensor) -> Recipe | None:
        source = self._source
        x = source.x
        if type(x) is not Tensor or x.dtype != tensor.dtype or source.why_not_fused():
            return None
        # Copies: an optimizer may change parameters before backward.
        numbers = [None if t is None else t.detach().clone() for t in (source.weight, source.bias)]
        of_batch = (source.mean, source.rstd) if source.is_own else (None, None)
        numbers += source.running or of_batch
        flat = x.detach().flatten(0, 1) if self._folds else x.detach()
        view = tensor.shape, tensor.stride(), tensor.storage_offset()
        options = not source.fixed, 0.0, source.eps, torch.backends.cudnn.enabled
        normalize = _by_rstd if source.is_own else torch.batch_norm
        make = partial(_normalize_again, normalize, flat, x._version, numbers, options, view)
        return Recipe(make, cost=3)


def _normalize_again(
    normalize: Any, x: Tensor, version: int, numbers: Any, options: Any, view: Any
) -> Tensor:
    return normalize(unchanged(x, version), *numbers, *options).as_strided(*view)


def _by_rstd(x: Tensor, weight: Any, bias: Any, mean: Tensor, rstd: Tensor, *_: Any) -> Tensor:
    """The output of the engine's own norm, to the bit."""
    shape = -1, *[1] * (x.dim() - 2)
    gain = rstd if weight is None else rstd * weight
    y = (x - mean.view(shape)).mul_(gain.view(shape))
    return y.add_(0.0 if bias is None else bias.view(shape))  # -0.0 + 0.0 is 0.0


class _OwnNorm(torch.autograd.Function):
    """The engine's own norm, with torch's gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        own, x, weight, *others, momentum, ctx.eps = inputs
        y, mean, rstd = own(x, weight, *others, momentum=momentum, eps=ctx.eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, grad: Any, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        grads: Any = None, None, None
        if grad is not None:
            with graph.plain_functions():
                grads = graph.batch_norm_backward(
                    grad, x, weight, None, None, mean, rstd, True, ctx.eps, needs
                )
        return None, *grads, None, None, None, None


_own_norm = graph.apply_of(_OwnNorm)


def _fits(tensor: Any, channels: int) -> bool:
    """Whether the engine's own norm takes a parameter or running statistics."""
    if tensor is None:
        return True
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32
    return is_plain and tensor.is_cpu and tensor.shape == (channels,) and tensor.is_contiguous()


def normalize(norm: Any, x: Tensor, place: Place, folds: bool) -> Tensor:
    """The batch norm of ``x``, whose output has a source; as ``_BatchNorm.forward``.

    ``folds``: whether ``x`` is ``[T, N, C, *]``, not ``[M, C, *]``.
    """
    weight, bias, mean, var = norm.weight, norm.bias, norm.running_mean, norm.running_var
    training, momentum, eps = norm.training, norm.momentum, norm.eps
    tracks, factor = norm.track_running_stats, 0.0 if momentum is None else momentum
    if training and tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    fixed = not (training or (mean is None and var is None))
    running: Any = (mean, var) if not training or tracks else (None, None)
    x = x if x.stride() == place.at.stride() else x.contiguous()  # as the plain module's flatten
    flat = x.flatten(0, 1) if folds else x
    given = weight, bias, *running
    is_own = place.own is not None and not fixed and (mean is None) == (var is None)
    is_own = is_own and all(_fits(tensor, place.channels) for tensor in given)
    if is_own:
        y, mean, rstd = _own_norm(place.own, flat, *given, float(factor), float(eps))
    else:
        y, mean, rstd, *_ = graph.batch_norm(
            *(flat, *given, not fixed, factor, eps, torch.backends.cudnn.enabled)
        )
    if flat.dim() > 3 and 1 in flat.shape and not flat.is_cuda:
        # Torch reads a gradient in another memory order wrongly: an axis of size 1 hides the order.
        y.register_hook(partial(arranged, strides=flat.stride()))
    if fixed:  # copies: training moves them, unseen by their version
        mean, var = running = tuple(t.detach().clone() for t in running)
        rstd = var.float().add(eps).rsqrt()
    y = y.view(x.shape) if folds else y
    source = Source(x, weight, bias, mean, rstd, running if fixed else None, eps)
    source.is_own = is_own
    return attach(y, Memory(y), Normalized(source, folds), source, place)


def place_of(norm: Any, x: Tensor, folds: bool) -> Place | None:
    """The place of the output of a norm of ``x``, or ``None``: then it is the plain module's."""
    axis = 1 + folds
    if x.dim() <= axis or x.is_inference():
        return None
    channels, flat = x.shape[axis], x.flatten(0, 1) if folds else x
    try:
        norm._check_input_dim(flat)
    except (ValueError, AssertionError):  # torch's error, or SpikingJelly's
        return None
    engine = backends.engine_of(x.device.type)
    if x.numel() <= channels or engine is bits:
        return None
    dense = x if graph.shares_memory(flat, x) else flat.view(x.shape)  # a copy
    if not is_dense(dense):
        return None
    at = torch.empty_strided(x.shape, dense.stride(), device="meta")
    inner = dense.stride(axis) if channels > 1 else x.numel()
    place = Place(at, channels, inner, (x.dtype, x.device))
    place.own = engine.plan_norm(flat)
    return place
