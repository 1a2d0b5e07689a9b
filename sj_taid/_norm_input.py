"""The tensor that a fused batch norm passes on, which nothing but its neuron may read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _graph
from ._forward import Forward, only_argument


class PassOn(Forward):
    """The forward of a batch norm that a neuron applies."""

    def __call__(self, *args: Any, **kwargs: Any) -> NormInput:
        norm, x, with_grad = self.module, only_argument(*args, **kwargs), torch.is_grad_enabled()
        # In step mode "m" the input is [T, N, C, *], and torch checks [N, C, *].
        norm._check_input_dim(x[0] if getattr(norm, "step_mode", "s") == "m" else x)
        return NormInput.wrap(x if with_grad else x.detach(), Call(self, with_grad, norm.training))


class Call(NamedTuple):
    """The call of a fused batch norm."""

    forward: PassOn
    with_grad: bool
    training: bool


class NormInput(Tensor):
    """The input of a batch norm on its way to the neuron that applies the norm.

    It is not normalised, so an operation on it raises an error.
    """

    x: Tensor
    call: Call

    @classmethod
    def wrap(cls, x: Tensor, call: Call) -> NormInput:
        wrapped = x.as_subclass(cls)
        wrapped.x, wrapped.call = x, call
        return wrapped

    def learns(self) -> bool:
        """Whether a gradient is asked for, as behind reentrant checkpointing of the norm alone."""
        return not torch.compiler.is_compiling() and _graph.requires_grad(self)

    def unflatten(self, dim: Any, sizes: Any) -> NormInput:
        """Done by containers that fold time; torch.compile cannot trace Tensor's own."""
        return NormInput.wrap(self.x.unflatten(dim, sizes), self.call)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        wrapped = args[0]
        if func.__name__ not in _READS_NO_VALUE or not isinstance(wrapped, NormInput):
            raise not_normalised(func.__name__)
        result = func(wrapped.x, *args[1:], **(kwargs or {}))
        return cls.wrap(result, wrapped.call) if isinstance(result, Tensor) else result


#: What containers, gradient checkpointing, counters of operations and torch.compile do with a
#: tensor that they hand on.
_READS_NO_VALUE = (
    *("__get__", "__set__", "__len__", "__repr__", "dim", "size", "stride", "numel"),
    *("is_floating_point", "requires_grad_", "detach", "clone", "register_hook"),
    *("_is_view", "is_conj", "is_neg", "storage_offset", "untyped_storage"),
    *("view", "view_as", "reshape", "flatten", "unsqueeze"),
)


def not_normalised(reader: str) -> RuntimeError:
    """The error of a ``reader`` that is not the neuron."""
    return RuntimeError(
        f"{reader} reads what a batch norm passed on for its neuron to normalise: "
        "sj_taid.unfuse_norm(net) lets it normalise by itself. Add hooks, replace neurons and call "
        "memopt.optimize_memory(net) before fuse_norm or accelerate"
    )
