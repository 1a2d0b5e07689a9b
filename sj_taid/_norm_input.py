"""The tensor that a fused batch norm passes on, which nothing but its neuron may read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._forward import Forward


class PassOn(Forward):
    """The forward of a batch norm that a neuron applies."""

    def __call__(self, x: Tensor) -> NormInput:
        return NormInput.wrap(x, self)


class NormInput(Tensor):
    """The input of a batch norm on its way to the neuron that applies the norm.

    It is not normalised, so an operation on it raises an error.
    """

    x: Tensor
    passed_on_by: PassOn

    @classmethod
    def wrap(cls, x: Tensor, passed_on_by: PassOn) -> NormInput:
        wrapped = x.as_subclass(cls)
        wrapped.x, wrapped.passed_on_by = x, passed_on_by
        return wrapped

    def unflatten(self, dim: Any, sizes: Any) -> NormInput:
        """Done by containers that fold time; torch.compile cannot trace Tensor's own."""
        return NormInput.wrap(self.x.unflatten(dim, sizes), self.passed_on_by)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        wrapped = args[0]
        if func.__name__ not in _READS_NO_VALUE or not isinstance(wrapped, NormInput):
            raise not_normalised(func.__name__)
        result = func(wrapped.x, *args[1:], **(kwargs or {}))
        return cls.wrap(result, wrapped.passed_on_by) if isinstance(result, Tensor) else result


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
