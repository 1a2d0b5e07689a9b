"""The surrogates that 0.0.0.0.14 lacks, and whether a surrogate gives counts."""

from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from .._internal.checks import check_sizes
from .._internal.compat import FUNCTIONAL_STATES


class _Step(torch.autograd.Function):
    """``step(x)``, with the gradient ``differentiate(grad, x)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, step: Any, differentiate: Any) -> Tensor:
        return step(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.differentiate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.differentiate(grad, x), None, None


if FUNCTIONAL_STATES:
    Rect = surrogate.Rect
else:

    class Rect(surrogate.SurrogateFunctionBase):  # type: ignore[no-redef]
        """2.x's rectangle of height alpha and width 1 / alpha, which 0.0.0.0.14 lacks."""

        def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
            super().__init__(alpha, spiking)

        @staticmethod
        def spiking_function(x: Tensor, alpha: float) -> Tensor:
            def differentiate(grad: Tensor, x: Tensor) -> Tensor:
                return grad * alpha * (x.abs() < 0.5 / alpha)

            return _Step.apply(x, surrogate.heaviside, differentiate)

        @staticmethod
        def primitive_function(x: Tensor, alpha: float) -> Tensor:
            return (alpha * x + 0.5).clamp(0.0, 1.0)


if hasattr(surrogate, "MultiLevelSpikeCount"):
    MultiLevelSpikeCount = surrogate.MultiLevelSpikeCount
else:

    class MultiLevelSpikeCount(surrogate.MultiArgsSurrogateFunctionBase):  # type: ignore[no-redef]
        """2.x's ``round(clamp(x, 0, D))``, straight-through in a window, which 0.0.0.0.14 lacks."""

        def __init__(
            self,
            max_spike_count: int,
            spiking: bool = True,
            grad_window: tuple[float, float] | None = None,
        ) -> None:
            super().__init__(spiking)
            check_sizes(max_spike_count=max_spike_count)
            self.max_spike_count = int(max_spike_count)
            self.grad_min, self.grad_max = grad_window or (0.0, float(max_spike_count))
            if not self.grad_min <= self.grad_max:
                raise ValueError(f"grad_window must be (low, high), but it is {grad_window}")

        def forward(self, x: Tensor) -> Tensor:
            if not self.spiking:
                return self._clamp(x)
            return _Step.apply(x, lambda x: self._clamp(x).round(), self._differentiate)

        def _clamp(self, x: Tensor) -> Tensor:
            return x.clamp(0, self.max_spike_count)

        def _differentiate(self, grad: Tensor, x: Tensor) -> Tensor:
            return grad * ((x >= self.grad_min) & (x <= self.grad_max))


def is_integer(surrogate_function: Any) -> bool:
    """Whether it gives counts, of H / V_th, not spikes."""
    return isinstance(surrogate_function, MultiLevelSpikeCount)


def levels_of(surrogate_function: Any) -> int:
    """The most that a step gives: 1 for spikes.

    >>> levels_of(surrogate.ATan()), levels_of(MultiLevelSpikeCount(4))
    (1, 4)
    """
    return surrogate_function.max_spike_count if is_integer(surrogate_function) else 1
