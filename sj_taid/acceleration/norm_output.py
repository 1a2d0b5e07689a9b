"""The output of a batch norm, computed by whoever reads it.

:class:`NormOutput` has no memory. A neuron on the fused operator takes the norm's input and numbers
instead, and computes norm and spikes in one. Any other operation computes the values and goes on as
if they had always been there; its gradient passes through :class:`_Wait`, whose backward is that of
torch's batch norm.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from .. import _graph
from ..ops.alif.autograd import arranged
from ..ops.alif.norm import Norm
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


class NormCall:
    """A call of a batch norm: its input ``[M, C, *]``, dense with M outermost, and its numbers.

    All detached: a detached output must not keep the graph alive.
    """

    def __init__(self, x: Tensor, norm: Norm, readers: dict[str, bool]) -> None:
        self.x, self.norm, self.readers = x.detach(), norm.detach(), readers
        self._version = _graph.version_of(x)
        self.is_captured = _graph.is_capturing()
        self.gradient = _Watch()
        self.hooks = _graph.saving_hooks()
        self.saves_input = torch.is_grad_enabled() and not _graph.is_checkpointed()

    def check_input(self) -> None:
        """Raise an error if the input has changed since the call."""
        if _graph.version_of(self.x) != self._version:
            raise RuntimeError(
                "the input of an accelerated batch norm was changed in place before its output was "
                "read: write h = h + o instead of h += o, or sj_taid.unaccelerate(net)"
            )

    @torch.no_grad()
    def values(self) -> Tensor:
        """The norm's output, in the input's shape and memory order."""
        self.check_input()
        norm: Any = self.norm
        x = _with_last_axis(self.x)
        # A batch's own statistics once more by torch, so that the values are torch's bit for bit.
        mean, var = _statistics(norm, x) if norm.fixed else (None, None)
        weight, bias = norm.affine.parameters(norm)
        y = F.batch_norm(x, mean, var, weight, bias, not norm.fixed, 0.0, norm.eps)
        return arranged(y.view(self.x.shape), self.x.stride())

    def view(self, at: Tensor, made: Tensor) -> Tensor:
        """The values at ``at``, in the memory order of ``made``."""
        values = self.values().as_strided(at.shape, at.stride(), at.storage_offset())
        return arranged(values, made.stride())


class _Wait(torch.autograd.Function):
    """Makes a :class:`NormOutput`; its backward is the batch norm's.

    The node in autograd's graph holds no tensor but those saved for backward, which may be freed,
    checkpointed or offloaded, and numbers per channel.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, norm: Norm, call: NormCall, shape: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient, ctx.norm = call.gradient, call.norm
        at = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        made = torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=memory_order(x))
        if len(shape) > x.dim():
            at, made = at.unflatten(0, shape[:2]), made.unflatten(0, shape[:2])
        output = NormOutput.of(call, at, made)
        output._inputs = x, norm
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grad, shape = grad.reshape(x.shape), x.shape
        norm, (mean, var) = ctx.norm, _statistics(ctx.norm, x)
        # As torch's forward saves them: in float32 on a GPU, in the parameters' dtype on a CPU.
        saved = norm.affine.mean_rstd.to(torch.float32 if x.is_cuda else var.dtype)
        # Torch takes both in one memory order, without looking.
        x, grad = _with_last_axis(x), _with_last_axis(grad)
        order = memory_order(x)
        grads = _aten.native_batch_norm_backward(
            *(grad.contiguous(memory_format=order), x.contiguous(memory_format=order), weight),
            *((mean, var) if norm.fixed else (None, None)),
            *(*saved, not norm.fixed, norm.eps, needs),
        )
        return (grads[0].view(shape) if needs[0] else None, *grads[1:], None, None, None)


def _watched(register: Any) -> Any:
    def register_and_watch(node: Any, hook: Any) -> Any:
        node.gradient.watch()
        return register(node, hook)

    return register_and_watch


# A hook on the node in autograd's graph counts as one on the norm's output.
_node: Any = _Wait._backward_cls
_node.register_hook = _watched(_node.register_hook)
_node.register_prehook = _watched(_node.register_prehook)


class _Content:
    """What a :class:`NormOutput` and its views show: a call's output, or values in memory."""

    def __init__(self, call: NormCall, at: Tensor, made: Tensor) -> None:
        self.call, self._at, self._made = call, at, made
        self.values: Tensor | None = None
        self.packing: Packing | None = None  # of the values

    @torch.inference_mode(False)
    def hold(self) -> Tensor:
        """Compute the values and keep them, since they may change in place."""
        if self.values is not None:
            return self.values
        if self.call.is_captured and not _graph.is_capturing():
            raise RuntimeError(
                "an accelerated batch norm's output was made in a CUDA graph, whose replays would "
                "not change a slice of it: write y = y + 0 first, or sj_taid.unaccelerate(net)"
            )
        self.values = self.compute(self._at, self._made)
        return self.values

    def compute(self, at: Tensor, made: Tensor) -> Tensor:
        if self.values is not None:
            return self.values.as_strided(made.shape, made.stride(), made.storage_offset())
        return self.call.view(at, made)


class NormOutput(Known):
    """The output of a batch norm, without memory.

    ``at`` is a tensor without memory that shows where the values are in the norm's input, ``made``
    one that shows where they would be in torch's own output.
    """

    #: the norm's input and the norm, of the output and its views that have a graph
    _inputs: tuple[Tensor, Norm] | None = None
    _content: _Content
    _at: Tensor
    _made: Tensor

    @staticmethod
    def __new__(cls, content: _Content, at: Tensor, made: Tensor) -> NormOutput:
        output = Tensor._make_wrapper_subclass(
            cls,
            made.shape,
            strides=made.stride(),
            storage_offset=made.storage_offset(),
            dtype=made.dtype,
            device=content.call.x.device,
        )
        # C++ that takes its memory raises an error, and does not read address 0.
        torch._C._set_throw_on_mutable_data_ptr(output)
        # Not in __init__, which torch.Tensor(y) would call with y.
        output._content, output._at, output._made = content, at, made
        return output

    @classmethod
    def of(cls, call: NormCall, at: Tensor, made: Tensor) -> NormOutput:
        """The output of a call, by itself."""
        # One object where the memory order is the input's, so that views are taken once.
        made = at if at.stride() == made.stride() else made
        return cls(_Content(call, at, made), at, made)

    @classmethod
    @torch._disable_dynamo
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0] if args else None
        if isinstance(first, NormOutput):
            if func in _VIEWS and (view := first._view(func, args[1:])) is not None:
                return view
            if func is _aten.clone.default and first._content.values is None:
                made = func(first._made, **kwargs)
                copied = NormOutput.of(first._content.call, first._at, made)
                copied._inputs = first._inputs if torch.is_grad_enabled() else None
                return copied
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.inplace_view in func.tags and isinstance(first, NormOutput):
            raise RuntimeError(
                f"{name} cannot change the shape of an accelerated norm's output in place: write "
                f"y = y.{name.rstrip('_')}(...), or sj_taid.unaccelerate(net)"
            )
        # Schemas of other libraries, such as c10d's, do not say what they change.
        is_mutable = func._schema.is_mutable or func.namespace != "aten"
        given = kwargs.get("out", first)

        def read(output: NormOutput) -> Tensor:
            if is_mutable or func.is_view:
                output._content.hold()
            return output.computed(name)

        args, kwargs = tree_map_only(NormOutput, read, (args, kwargs))
        result = func(*args, **kwargs)
        changed = kwargs.get("out", args[0] if args else None)
        return given if result is changed else result

    def _view(self, func: Any, args: tuple[Any, ...]) -> NormOutput | None:
        try:
            at = _VIEWS[func](self._at, *args)
        except RuntimeError:  # no view of the input's memory
            return None
        made = at if self._made is self._at else func(self._made, *args)
        view = NormOutput(self._content, at, made)
        if func is not _aten.detach.default and torch.is_grad_enabled():
            view._inputs = self._inputs
        return view

    def computed(self, reader: str) -> Tensor:
        """The values, outside autograd's graph, for ``reader``."""
        if _graph.recomputation() is None:
            self._content.call.readers.setdefault(reader, False)
        return self._content.compute(self._at, self._made)

    def plain(self, reader: str) -> Tensor:
        """The values as a tensor of autograd's graph that has memory."""
        values, packing = _Read.apply(self, reader), self.packing()
        return compact(values, packing) if packing else values

    def read_as_one(self, reader: str, has_channels: bool) -> tuple[Tensor, dict[str, Any]] | str:
        """What a neuron computes norm and spikes of in one, or why it cannot.

        That is the norm's input as ``[T, N, C, *]``, the norm, and the layout of what the neuron
        was given in the input's memory. ``has_channels``: whether the neuron has parameters per
        channel, on axis 2 of what it was given.
        """
        content = self._content
        call, steps = content.call, self._at.shape[0]
        if content.values is not None:
            return "its values were changed"
        inputs: Any = (call.x, call.norm)
        if self.requires_grad:
            inputs = self._inputs if _comes_from_norm(self.grad_fn) else None
        if call.gradient.has_hooks or inputs is None:
            return "a hook or a function of its own stands between"
        # Hooks around the checkpoint may give its recomputation the values.
        if _graph.is_checkpointed() and call.hooks != _graph.saving_hooks():
            return "gradient checkpointing begins between them"
        x, norm = inputs
        if x.shape[0] % steps or (steps > 1 and self._at.stride(0) * steps != x.numel()):
            return "time is not the outermost axis in memory"
        shape, strides = self._at.shape, self._at.stride()
        if has_channels and (shape[2:3], strides[2:3]) != (x.shape[1:2], x.stride()[1:2]):
            return "its channels are not those of the norm"
        call.check_input()
        call.gradient.is_fused = True
        call.readers[reader] = True
        return x.unflatten(0, (steps, -1)), {"norm": norm, "layout": (shape, strides)}

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
        call = self._content.call  # the term keeps its input
        return Term((), partial(call.view, self._at, self._made)) if call.saves_input else None

    def exposed(self) -> Tensor:
        self._content.hold()
        return self.plain("its memory")

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


class _Read(torch.autograd.Function):
    """The values of a :class:`NormOutput` as a plain tensor."""

    @staticmethod
    def forward(ctx: Any, output: NormOutput, reader: str) -> Tensor:
        return output.computed(reader).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def wait(x: Tensor, norm: Norm, readers: dict[str, bool], shape: torch.Size) -> Any:
    """The output of a norm of ``x`` ``[M, C, *]``, in ``shape``: that, or ``[T, N, C, *]``."""
    with torch._C.DisableTorchFunctionSubclass(), saving([x] if isinstance(x, Known) else []):
        return _Wait.apply(x, norm.weight, norm.bias, norm, NormCall(x, norm, readers), shape)


def _comes_from_norm(node: Any) -> bool:
    """Whether views alone lie between a node of autograd's graph and a norm."""
    while node is not None and re.sub(r"Backward\d*", "", node.name()) in _VIEW_NODES:
        ((node, _),) = node.next_functions
    return isinstance(node, _Wait._backward_cls)


def _statistics(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a norm of ``x``, in the dtype that torch's operators ask for."""
    (mean, rstd), (weight, bias, running, *_) = norm.affine.mean_rstd, norm
    like = next((t for t in (weight, bias, running) if t is not None), x)
    return mean.to(like.dtype), (rstd.pow(-2) - norm.eps).to(like.dtype)


def memory_order(x: Tensor) -> torch.memory_format:
    """The memory format of torch's batch norm of ``x``: channels last, or contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    is_last = last is not None and x.is_contiguous(memory_format=last)
    return last if last and is_last and not x.is_contiguous() else torch.contiguous_format


def _with_last_axis(x: Tensor) -> Tensor:
    """``[M, C, L]`` as ``[M, C, L, 1]``, which torch takes with channels last in memory too."""
    return x.unsqueeze(-1) if x.dim() == 3 else x
