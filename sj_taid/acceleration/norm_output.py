"""The output of a batch norm, computed by whoever reads it.

:class:`NormOutput` has no memory. A neuron on the fused operator takes the norm's input and numbers
instead, and computes norm and spikes in one. Any other operation computes the values and goes on as
if they had always been there; its gradient passes through :class:`_Wait`, whose backward is that of
torch's batch norm.

An output and its views share a :class:`_Content`, which has the values once they are computed, and
the :class:`NormCall` that computes them, with the input. Each has a :class:`Place`: its shape, and
where its values lie in the input. What all calls on such an input share is in :class:`Waiting`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map_only

from .. import _graph
from .._fused_neuron import NormInput
from ..ops import backends
from ..ops.alif.autograd import arranged, cast_numbers
from ..ops.alif.plan import (
    Dynamics,
    Engine,
    NormSpec,
    Plans,
    Spec,
    find_norm_plan,
    mean_and_rstd,
    table,
)
from ..ops.bits import is_dense
from .compact import Known, Packing, Term, compact, saving

_aten = torch.ops.aten
#: operations that change the shape alone, and their equals for another memory order
_VIEWS: dict[Any, Any] = {
    _aten.view.default: _aten.view.default,
    _aten._unsafe_view.default: _aten.view.default,
    _aten._reshape_alias.default: lambda tensor, size, stride: tensor.view(size),
    **{
        operation: operation
        for operation in (
            *(_aten.transpose.int, _aten.permute.default, _aten.t.default, _aten.unsqueeze.default),
            *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims),
            *(_aten.alias.default, _aten.detach.default),
        )
    },
}
#: the operations in place that change the shape alone
_CHANGES: dict[Any, Any] = {
    _aten.unsqueeze_.default: _aten.unsqueeze.default,
    _aten.squeeze_.default: _aten.squeeze.default,
    _aten.squeeze_.dim: _aten.squeeze.dim,
    _aten.squeeze_.dims: _aten.squeeze.dims,
    _aten.transpose_.default: _aten.transpose.int,
    _aten.t_.default: _aten.t.default,
}
#: the nodes of autograd's graph that these operations make, and ``clone``
_VIEW_NODES = {
    *("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "T", "Unsqueeze", "Squeeze"),
    *("Alias", "Clone"),
}


class _Watch:
    """Whether something takes the gradient of a norm's output, and whether a neuron has read it."""

    def __init__(self) -> None:
        self.has_hooks = self.is_fused = False

    def watch(self) -> None:
        """Let no neuron read the output as one operation, since something takes its gradient."""
        if self.is_fused:
            raise RuntimeError(
                "a neuron has read this norm's output as one operation with the norm, and no "
                "gradient will reach it: register the hook, or call retain_grad(), before the "
                "neuron runs, or sj_taid.unaccelerate(net)"
            )
        self.has_hooks = True


class Place:
    """Where a norm's output, or a view of it, lies; the same at every call of one plan.

    ``at`` is a tensor without memory that shows where the values are in the norm's input, ``made``
    one that shows where they would be in torch's own output.
    """

    __slots__ = ("at", "made", "views", "waiting")

    def __init__(self, waiting: Waiting, at: Tensor, made: Tensor) -> None:
        # One object where the memory order is the input's, so that views are taken once.
        self.waiting, self.at, self.made = waiting, at, at if at.stride() == made.stride() else made
        #: views by operation and arguments; ``None`` where they are none of the input's memory
        self.views = Plans()

    def view(self, func: Any, args: tuple[Any, ...]) -> Place | None:
        """The place of a view."""
        key = func, *map(_hashable, args)
        found = self.views.get(key, self)
        return found if found is not self else self.views.keep(key, self._view(func, args))

    def _view(self, func: Any, args: tuple[Any, ...]) -> Place | None:
        try:
            at = _VIEWS[func](self.at, *args)
        except RuntimeError:  # no view of the input's memory
            return None
        made = at if self.made is self.at else func(self.made, *args)
        return Place(self.waiting, at, made)

    def copy(self, order: torch.memory_format) -> Place:
        """The place of a clone."""
        found = self.views.get(order)
        if found is None:
            made = torch.clone(self.made, memory_format=order)
            found = self.views.keep(order, Place(self.waiting, self.at, made))
        return found

    def why_apart(self, has_channels: bool) -> str | None:
        """Why no neuron computes this as one operation with the norm, or ``None``.

        ``has_channels``: whether the neuron has parameters per channel, on axis 2.
        """
        (steps, *_), (time, *_), norm = self.at.shape, self.at.stride(), self.waiting.spec
        if self.waiting.rows % steps or (steps > 1 and time * steps != norm.size):
            return "time is not the outermost axis in memory"
        axis = self.at.shape[2:3], self.at.stride()[2:3]
        if has_channels and axis != ((norm.channels,), (norm.inner,)):
            return "its channels are not the norm's"
        return None

    def spec(self, dynamics: Dynamics, per_channel: bool, *flags: bool) -> Spec:
        """The spec of a neuron that reads this as one operation with the norm."""
        norm, steps = self.waiting.spec, self.at.shape[0]
        neurons = norm.size // steps
        inner = norm.inner if norm.channels > 1 else neurons
        place: Any = (norm.channels, inner, tuple(self.at.shape), self.at.stride())
        options: Any = (per_channel, True, norm.fixed, *flags)
        return Spec(dynamics, norm.dtype, norm.device, steps, neurons, *place, *options)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Waiting:
    """A batch norm's call, decided in advance."""

    #: Calls in a row whose output no neuron read; after so many the norm is torch's own, which is
    #: faster then, but for one call in so many more.
    PATIENCE, AGAIN = 3, 64
    #: whether a sum or a pool has read an output: both save less of one that is known
    is_marked = False

    def __init__(
        self, module: Any, x: Tensor, folds: bool, tensors: Any, spec: NormSpec, engine: Engine,
        reads: bool, counts: bool,
    ) -> None:  # fmt: skip
        """``reads``: whether running statistics would have a use; ``counts``: it counts batches."""
        self.spec, self.plan = spec, find_norm_plan(engine, spec)
        self.folds, self.copies, self.idle = folds, not is_dense(x), 0
        #: the shape of the plain module's input ``[M, C, *]``
        self.strides = (x.flatten(0, 1) if folds else x).stride()
        #: whether torch's batch norm of the input is the output
        self.is_recomputable = not self.copies
        given = [t for t in tensors if t is not None]
        self.has_weight, self.has_bias = (t is not None for t in tensors[:2])
        #: the dtype that torch's operators ask for
        self.dtype = given[0].dtype if given else x.dtype
        self.casts = any(t.dtype != torch.float32 or not t.is_contiguous() for t in given)
        axis = 1 + folds
        self.rows = x.shape[:axis].numel()
        options: Any = {"dtype": x.dtype, "device": "meta"}
        if self.copies:
            at = torch.empty(x.shape, **options)
        else:
            at = torch.empty_strided(x.shape, x.stride(), **options)
        flat = at.flatten(0, 1) if folds else at
        order = memory_order(flat)
        if self.copies:  # the plain module's input is not dense
            strided = torch.empty_strided(flat.shape, self.strides, device="meta")
            order = suggest_memory_format(strided)
        made = torch.empty_like(flat, memory_format=order).view(x.shape)
        self.place = Place(self, at, made)
        self.reads, self.counts = reads and module.running_mean is not None, counts

    def pays(self) -> bool:
        """Whether to wait once more."""
        self.idle += 1
        if self.idle <= self.PATIENCE or self.idle % self.AGAIN == 0:
            return True
        # A recomputation must do what the forward did.
        return _graph.are_checkpoints(_graph.saving_hooks())

    @property
    def is_trial(self) -> bool:
        """Whether nothing says that a neuron will read this call's output."""
        return self.idle > 0 and self.reads and not self.spec.fixed

    def unused_statistics(self) -> tuple[Tensor | None, ...]:
        """Running statistics for a norm by a batch's own, which moves and never reads them."""
        if not self.reads or self.dtype == self.spec.dtype:
            return None, None
        # In half precision the result depends on their dtype.
        shape = 2, self.spec.channels
        return torch.zeros(shape, dtype=self.dtype, device=self.spec.device).unbind()

    def flat(self, x: Tensor) -> Tensor:
        """The input as the plain module gets it."""
        return _laid_out(x.flatten(0, 1) if self.folds else x, self.strides)

    def numbers(self, x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, batches: Any) -> Any:
        """The norm's numbers for ``x``; its running statistics are updated."""
        if not self.reads:
            mean = var = None
        if self.casts:
            return cast_numbers(self.plan, x, (weight, bias, mean, var), batches)
        return self.plan.numbers(x, weight, bias, mean, var, batches)


def decide(module: Any, x: Tensor, folds: bool, tensors: Any) -> Waiting | None:
    """How a norm waits for an input like ``x``; ``None`` if it does not, but is torch's own.

    ``tensors``: its weight, bias, running mean and variance, or ``None`` for each.
    """
    engine, axis = backends.resolve(backends.AUTO, x, None).engine, 1 + folds
    if (
        engine is None
        or x.is_inference()
        or x.dim() <= axis
        or x.shape[axis] != module.num_features
    ):
        return None
    if any(t is not None and (len(t), t.device) != (x.shape[axis], x.device) for t in tensors):
        return None  # torch's error: kernels read by addresses
    batches = module.num_batches_tracked
    if batches is not None and batches.device != x.device:
        return None
    try:
        module._check_input_dim(x.flatten(0, 1) if folds else x)
    except (ValueError, AssertionError):
        return None
    uses_batch = module.training or module.running_mean is None
    if x.numel() <= (x.shape[axis] if uses_batch else 0):
        return None  # torch's error, or an empty batch
    reads = module.track_running_stats or not module.training
    counts = module.training and reads and batches is not None
    dense = x if is_dense(x) else torch.empty(x.shape, device="meta")
    spec = NormSpec(
        *(x.dtype, x.device, x.numel(), x.shape[axis]),
        dense.stride(axis) if x.shape[axis] > 1 else x.numel(),
        not uses_batch,
        module.momentum if module.momentum is not None or counts else 0.0,
        module.eps,
    )
    return Waiting(module, x, folds, tensors, spec, engine, reads, counts)


class NormCall:
    """A call of a batch norm: its input, dense with its first axis outermost, and its numbers.

    All detached: a detached output must not keep the graph alive. ``strides``: the plain module's
    input has these.
    """

    def __init__(
        self, x: Tensor, numbers: Tensor, waiting: Waiting, readers: Any, trial: Trial | None
    ) -> None:
        self.x, self.waiting, self.readers, self._trial = x.detach(), waiting, readers, trial
        self.torch_norm = _TorchNorm(numbers, waiting, trial)
        self._version = x._version
        self.is_captured = _graph.is_capturing(x)
        self.gradient = _Watch()
        self.hooks = _graph.saving_hooks()

    def check_input(self) -> None:
        """Raise an error if the input has changed since the call."""
        if self.x._version != self._version:
            raise _changed("its output was read")

    def keep_waiting(self) -> None:
        """Note that a neuron reads the output."""
        self.waiting.idle = -1  # the next call is no trial
        if self._trial:
            self._trial.keep_fused()

    def values(self, made: Tensor) -> Tensor:
        """The norm's output, in the memory order of ``made``."""
        self.check_input()
        values = self.torch_norm.forward(self.x).view(made.shape)
        return arranged(values, made.stride())


def _changed(before: str) -> RuntimeError:
    """The error of a norm's input that has changed since the call."""
    return RuntimeError(
        f"the input of an accelerated batch norm was changed in place before {before}: write "
        "h = h + o instead of h += o, or sj_taid.unaccelerate(net)"
    )


class Recomputed(Packing):
    """The output of torch's own norm: a sum keeps it as the norm's input, which backward keeps.

    All else saves it as it is.
    """

    is_saved, holds_others = False, True

    def __init__(self, y: Tensor, x: Tensor, waiting: Waiting, tensors: Any) -> None:
        super().__init__(y)
        self._waiting, self._version = waiting, x._version
        self._x: Any = None
        if waiting.is_recomputable and type(x) is Tensor and x.dtype == y.dtype:
            self._x = x.detach()
            numbers = tensors if waiting.spec.fixed else (*tensors[:2], None, None)
            # Copies: training moves running statistics, unseen by their version.
            self._numbers = [None if t is None else t.detach().clone() for t in numbers]

    def term(self, tensor: Tensor) -> Term | None:
        return None if self._x is None else super().term(tensor)

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return ()

    def restore(self, *parts: Tensor) -> Tensor:
        waiting, x, (weight, bias, *running) = self._waiting, self._x, self._numbers
        if x._version != self._version:
            raise _changed("the backward")
        fixed, eps = waiting.spec.fixed, waiting.spec.eps
        mean, var = running if fixed else waiting.unused_statistics()
        flat = x.flatten(0, 1) if waiting.folds else x
        options: Any = not fixed, 0.0, eps, torch.backends.cudnn.enabled
        return torch.batch_norm(flat, weight, bias, mean, var, *options).view(x.shape)


class Trial:
    """The running statistics of a call of which nobody knows yet who reads its output.

    The fused norm's differ from torch's by rounding. Which of both a net gets depends on who reads
    its norm, never on how often this process has called it: a training that is resumed ends as one
    that was not interrupted. But a norm that is called again before anything reads its output keeps
    the fused norm's.
    """

    def __init__(self, module: Any) -> None:
        """Before the fused norm moves them."""
        self.running = module.running_mean, module.running_var
        self._before = [t.clone() for t in self.running]
        momentum = module.momentum
        self.momentum = 1 / float(module.num_batches_tracked + 1) if momentum is None else momentum
        self._fused: list[Tensor] | None = None
        self._is_open = True

    def close(self) -> None:
        """Leave them as they are: the norm's next call moves them on."""
        self._is_open = False

    def _set(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self.running, values, strict=True):
            tensor.copy_(value)

    def begin_torch(self) -> bool:
        """Set them back for torch's update, at the first reader other than a neuron."""
        if not self._is_open or self._fused is not None:
            return False
        self._fused = [t.clone() for t in self.running]
        self._set(self._before)
        return True

    def keep_fused(self) -> None:
        """Take the fused norm's: a neuron reads the output."""
        if self._is_open and self._fused is not None:
            self._set(self._fused)
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:  # a copied norm has no call
        return type(None), ()


class _TorchNorm:
    """Torch's own batch norm of a call: values and gradients are torch's bit for bit.

    So the statistics of a batch are taken once more, in the order in which the plain module's input
    lies in memory.
    """

    def __init__(self, numbers: Tensor, waiting: Waiting, trial: Trial | None) -> None:
        self.numbers, self._waiting, self._trial = numbers, waiting, trial
        self._saved: Any = None  # for backward, by the last forward

    def _statistics(self) -> tuple[Tensor | None, ...]:
        """Running mean and variance at the call."""
        waiting, (mean, rstd) = self._waiting, mean_and_rstd(self.numbers)
        if not (waiting.reads and waiting.spec.fixed):
            return waiting.unused_statistics()
        return mean.to(waiting.dtype), (rstd.pow(-2) - waiting.spec.eps).to(waiting.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The values for the detached ``x``."""
        waiting, spec, trial = self._waiting, self._waiting.spec, self._trial
        running: Any
        if trial and trial.begin_torch():
            running, momentum = trial.running, trial.momentum
        else:
            running, momentum = self._statistics(), 0.0
        weight, bias = table(self.numbers)[3:5].to(waiting.dtype).unbind()
        given = (
            *(waiting.flat(x), weight if waiting.has_weight else None),
            *(bias if waiting.has_bias else None, *running),
        )
        options = (not spec.fixed, momentum, spec.eps, torch.backends.cudnn.enabled)
        forward: Any = torch._batch_norm_impl_index
        y, mean, rstd, reserve, kind = forward(*given, *options)
        self._saved = kind, running, (mean, rstd, not spec.fixed, spec.eps), reserve
        return y

    def backward(
        self, x: Tensor, weight: Tensor | None, grad: Tensor, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        if self._saved is None:  # nobody has read the values
            self.forward(x.detach())
        kind, running, numbers, reserve = self._saved
        flat = self._waiting.flat(x)
        grad_x, *others = _aten._batch_norm_impl_index_backward(
            kind, flat, grad.reshape(flat.shape), weight, *running, *numbers, needs, reserve
        )
        return grad_x.view(x.shape) if needs[0] else None, *others


def _laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x`` in memory by ``strides``, along which values may repeat; as it is for a graph of it."""
    if x.stride() == strides or (x.requires_grad and torch.is_grad_enabled()):
        return x
    once = x[tuple(slice(None) if stride else slice(1) for stride in strides)]
    return arranged(once, strides).as_strided(x.shape, strides)


class _Wait(torch.autograd.Function):
    """Makes a :class:`NormOutput`; its backward is the batch norm's.

    The node in autograd's graph holds no tensor but those saved for backward, which may be freed,
    checkpointed or offloaded, and numbers per channel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, call: NormCall) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Not the call, which holds the input.
        ctx.gradient, ctx.torch_norm = call.gradient, call.torch_norm
        place, numbers = call.waiting.place, call.torch_norm.numbers
        output = NormOutput(_Content(call, partial(call.values, place.made)), place)
        output._inputs = NormInput(x, weight, bias, numbers, place, ctx.needs_input_grad[:3])
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads = ctx.torch_norm.backward(x, weight, grad, ctx.needs_input_grad[:3])
        return *grads, None


def _watched(register: Any) -> Any:
    def register_and_watch(node: Any, hook: Any) -> Any:
        node.gradient.watch()
        return register(node, hook)

    return register_and_watch


_wait = _graph.apply_of(_Wait)

# A hook on the node in autograd's graph counts as one on the norm's output.
_node: Any = _Wait._backward_cls
_node.register_hook = _watched(_node.register_hook)
_node.register_prehook = _watched(_node.register_prehook)


class _Content:
    """What a :class:`NormOutput` and its views show: a call's output, or values in memory."""

    def __init__(self, call: NormCall, compute: Callable[[], Tensor]) -> None:
        self.call, self.compute = call, compute
        self.values: Tensor | None = None
        self.packing: Packing | None = None  # of the values

    @torch.inference_mode(False)
    def hold(self) -> Tensor:
        """Compute the values and keep them, since they may change in place."""
        if self.values is not None:
            return self.values
        if self.call.is_captured and not _graph.is_capturing(self.call.x):
            raise RuntimeError(
                "an accelerated batch norm's output was made in a CUDA graph, whose replays would "
                "not change a slice of it: write y = y + 0 first, or sj_taid.unaccelerate(net)"
            )
        self.values = self.compute()
        return self.values

    def show(self, made: Tensor) -> Tensor:
        """The values of a view."""
        return _shown(self.compute if self.values is None else self.hold, made)


def _shown(compute: Callable[[], Tensor], made: Tensor, strides: Any = None) -> Tensor:
    """What ``made`` would show of what ``compute`` gives; in memory by ``strides``, if given."""
    values = compute().as_strided(made.shape, made.stride(), made.storage_offset())
    return arranged(values, strides or made.stride())


class NormOutput(Known):
    """The output of a batch norm, without memory."""

    #: what a neuron reads instead, of the output and its views that have a graph
    _inputs: NormInput | None = None
    _content: _Content
    _place: Place

    @staticmethod
    def __new__(cls, content: _Content, place: Place) -> NormOutput:
        made = place.made
        output = Tensor._make_wrapper_subclass(
            cls,
            made.shape,
            strides=made.stride(),
            storage_offset=made.storage_offset(),
            dtype=made.dtype,
            device=content.call.waiting.spec.device,
        )
        # C++ that takes its memory raises an error, and does not read address 0.
        torch._C._set_throw_on_mutable_data_ptr(output)
        # Not in __init__, which torch.Tensor(y) would call with y.
        output._content, output._place = content, place
        return output

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        dispatch = _dispatch_apart if _graph.is_dynamo_near() else _dispatch
        return dispatch(func, args, kwargs or {})

    def _view(self, func: Any, args: tuple[Any, ...]) -> NormOutput | None:
        place = self._place.view(func, args)
        if place is None:
            return None
        view = NormOutput(self._content, place)
        if func is not _aten.detach.default and torch.is_grad_enabled() and self._inputs:
            view._inputs = self._inputs._replace(place=place)
        return view

    def _copy(self, order: torch.memory_format) -> NormOutput:
        """A clone; it waits too."""
        content, place = self._content, self._place.copy(order)
        compute = partial(_shown, content.compute, self._place.made, place.made.stride())
        copied = NormOutput(_Content(content.call, compute), place)
        if torch.is_grad_enabled() and self._inputs:
            copied._inputs = self._inputs._replace(place=place)
        return copied

    def _change_shape(self, func: Any, args: tuple[Any, ...]) -> NormOutput:
        """The same object as a view of itself."""
        view = _CHANGES.get(func)
        if view is None:
            name = func._schema.name.removeprefix("aten::")
            raise RuntimeError(
                f"{name} cannot change an accelerated norm's output, which has no memory of its "
                "own: write y = y + 0 first, or sj_taid.unaccelerate(net)"
            )
        place: Any = self._place.view(view, args)
        self._place = place
        if self._inputs:
            self._inputs = self._inputs._replace(place=place)
        with no_dispatch():  # of the wrapper itself
            func(self, *args)
        return self

    def computed(self, reader: str) -> Tensor:
        """The values, outside autograd's graph, for ``reader``."""
        if _graph.recomputation() is None:
            self._content.call.readers.setdefault(reader, False)
        return self.values()

    def values(self) -> Tensor:
        return self._content.show(self._place.made)

    def plain(self, reader: str) -> Tensor:
        """The values as a tensor of autograd's graph that has memory."""
        values, packing = _Read.apply(self, reader), self.packing()
        return compact(values, packing) if packing else values

    def read_as_one(self, has_channels: bool) -> NormInput | str:
        """What a neuron computes norm and spikes of in one, or why it cannot.

        ``has_channels``: whether the neuron has parameters per channel, on axis 2.
        """
        content, inputs = self._content, self._inputs
        call = content.call
        if content.values is not None:
            return "its values were changed"
        if not torch.is_grad_enabled():
            return "no gradient is asked for"
        if call.gradient.has_hooks or inputs is None or not _norm_node(self._node):
            return "a hook or a function of its own stands between"
        x, weight, bias, *_, needed = inputs
        needs_weight = weight is not None and weight.requires_grad
        needs_bias = bias is not None and bias.requires_grad
        if (x.requires_grad, needs_weight, needs_bias) != needed:
            return "its input or parameters require a gradient no longer, or only since"
        # Hooks around the checkpoint may give its recomputation the values.
        hooks = _graph.saving_hooks()
        if call.hooks != hooks and _graph.are_checkpoints(hooks):
            return "gradient checkpointing begins between them"
        if reason := self._place.why_apart(has_channels):
            return reason
        call.check_input()
        return inputs

    def mark_read(self, reader: str) -> None:
        """Note that a neuron has read the output as one operation with the norm."""
        call = self._content.call
        call.gradient.is_fused = call.readers[reader] = True
        call.keep_waiting()

    def packing(self) -> Packing | None:
        """That of values changed in place; a waiting output is saved as it is, without memory."""
        values, packing = self._content.values, self._content.packing
        is_known = values is not None and packing is not None and packing.describes(values)
        return packing if is_known else None

    def learn(self, packing: Packing) -> None:
        self._content.packing = packing

    def memory(self) -> Tensor:
        return self._content.hold()

    def term(self) -> Term | None:
        if self._content.values is not None:
            return super().term()
        content = self._content  # the term keeps the norm's input
        if _graph.are_checkpoints(content.call.hooks):
            return None
        waiting = content.call.waiting
        waiting.is_marked = True
        if not waiting.is_recomputable:
            content.call.keep_waiting()
        return Term((), partial(_shown, content.compute, self._place.made))

    def exposed(self) -> Any:
        self._content.hold()
        return self.plain("its memory")

    @property
    def _node(self) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return super().grad_fn

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """The node in autograd's graph; reading it counts as a hook: a view's is not seen.

        After a fused neuron has read the norm's input, it is the norm's node, which refuses hooks.
        """
        node, gradient = self._node, self._content.call.gradient
        if (norm_node := _norm_node(node)) and gradient.is_fused:
            return norm_node
        gradient.has_hooks |= norm_node is not None
        return node

    @property
    def data(self) -> Tensor:
        return self.exposed().data

    @data.setter
    def data(self, values: Tensor) -> None:
        if (values.shape, values.dtype, values.device) != (self.shape, self.dtype, self.device):
            raise RuntimeError(
                "the data of an accelerated norm's output keeps its shape, dtype and device: take "
                "a sum with 0 for a parameter, nn.Parameter(y.detach() + 0), or "
                "sj_taid.unaccelerate(net)"
            )
        self._content.hold()
        self.computed("data").copy_(values)

    def watch(self) -> None:
        self._content.call.gradient.watch()

    def note_pool(self) -> None:
        self._content.call.waiting.is_marked = True


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    first = args[0] if args else None
    if torch.is_inference_mode_enabled():  # a view of it would be no inference tensor
        with torch.inference_mode(False), torch.no_grad():
            return func(*args, **kwargs)
    if isinstance(first, NormOutput):
        if func in _VIEWS and (view := first._view(func, args[1:])) is not None:
            return view
        if func is _aten.clone.default and first._content.values is None:
            return first._copy(kwargs.get("memory_format", torch.preserve_format))
        if torch.Tag.inplace_view in func.tags:
            return first._change_shape(func, args[1:])
    name = func._schema.name.removeprefix("aten::")
    # Schemas of other libraries, such as c10d's, do not say what they change.
    is_mutable = func._schema.is_mutable or func.namespace != "aten" or name.startswith("unsafe_")
    given = kwargs.get("out", first)

    def read(output: NormOutput) -> Tensor:
        if is_mutable or func.is_view:
            output._content.hold()
        return output.computed(name)

    if kwargs or any(isinstance(value, list | tuple) for value in args):
        args, kwargs = tree_map_only(NormOutput, read, (args, kwargs))
    else:  # the usual, without the walk
        args = [read(value) if isinstance(value, NormOutput) else value for value in args]
    result = func(*args, **kwargs)
    changed = kwargs.get("out", args[0] if args else None)
    return given if result is changed else result


#: the same while a graph of torch.compile runs or is traced, which breaks there
_dispatch_apart = torch._disable_dynamo(_dispatch)


class _Read(torch.autograd.Function):
    """The values of a :class:`NormOutput` as a plain tensor."""

    @staticmethod
    def forward(ctx: Any, output: NormOutput, reader: str) -> Tensor:
        return output.computed(reader).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def wait(
    module: Any, x: Tensor, waiting: Waiting, weight: Any, bias: Any, mean: Any, var: Any
) -> Any:
    """The output of a norm of ``x``."""
    with saving([x]) if isinstance(x, Known) else nullcontext():
        x = x.contiguous() if waiting.copies else x
        batches = module.num_batches_tracked if waiting.counts else None
        trial = Trial(module) if waiting.is_trial else None
        numbers = waiting.numbers(x, weight, bias, mean, var, batches)
        module._taid_trial = trial
        call = NormCall(x, numbers, waiting, module._taid_readers, trial)
        if module._backward_hooks:
            call.gradient.watch()
        return _wait(x, weight, bias, call)


def _norm_node(node: Any) -> Any:
    """The norm's node in autograd's graph, if views alone lie between it and ``node``."""
    while type(node) is not _node:
        if node is None or re.sub(r"Backward\d*", "", node.name()) not in _VIEW_NODES:
            return None
        ((node, _),) = node.next_functions
    return node


def memory_order(x: Tensor) -> torch.memory_format:
    """The memory format of torch's batch norm of ``x``: channels last, or contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    is_last = last is not None and x.is_contiguous(memory_format=last)
    return last if last and is_last and not x.is_contiguous() else torch.contiguous_format
