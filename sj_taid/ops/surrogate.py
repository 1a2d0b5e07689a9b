"""Surrogate derivatives in closed form, as CUDA C: a kernel cannot call the module."""

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from .._internal.checks import check_sizes
from .._internal.compat import FUNCTIONAL_STATES

# SpikingJelly 2.x's inner slope of PiecewiseLeakyReLU, and 0.0.0.0.14's, which is twice that.
_LEAKY_AREA = 0.5 if FUNCTIONAL_STATES else 1.0


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


class Derivative(NamedTuple):
    """One surrogate's derivative, a function of ``x = H - V_th`` and two constants ``a`` and ``b``.

    That of :class:`MultiLevelSpikeCount` is a function of ``x = H / V_th``, by which it counts.

    The constants are computed in double precision, as SpikingJelly does: then a step in the
    derivative (``Rect``'s edge, say) lies at the same float32 number.
    """

    #: computes ``(a, b)`` from attributes of the module
    constants: Callable[..., tuple[float, float]]
    #: the body of ``float f(float x, float a, float b)``; ``reciprocal`` is the kernels' ``1 / x``
    cuda: str
    #: the names of these attributes
    parameters: tuple[str, ...] = ("alpha",)


_SPIKINGJELLYS = {
    "Sigmoid": Derivative(
        lambda alpha: (alpha, 0.0),
        "float e = exponential(-fabsf(a * x)); float r = reciprocal(1.0f + e);"
        " return a * e * r * r;",
    ),
    "ATan": Derivative(
        lambda alpha: (alpha / 2, math.pi / 2 * alpha),
        "float y = b * x; return a * reciprocal(fmaf(y, y, 1.0f));",
    ),
    "PiecewiseQuadratic": Derivative(
        lambda alpha: (alpha, 1 / alpha),
        "return fabsf(x) > b ? 0.0f : a - a * a * fabsf(x);",
    ),
    "PiecewiseExp": Derivative(
        lambda alpha: (alpha / 2, alpha),
        "return a * exponential(-b * fabsf(x));",
    ),
    "SoftSign": Derivative(
        lambda alpha: (1 / alpha, 1 / (2 * alpha)),
        "float r = reciprocal(a + fabsf(x)); return b * r * r;",
    ),
    "SuperSpike": Derivative(
        lambda alpha: (alpha, 0.0),
        "float r = reciprocal(1.0f + fabsf(x)); return a * r * r;",
    ),
    "Erf": Derivative(
        lambda alpha: (alpha, alpha / math.sqrt(math.pi)),
        "return b * exponential(-(a * x) * (a * x));",
    ),
    "PiecewiseLeakyReLU": Derivative(
        lambda w, c: (w, c),
        f"return fabsf(x) < a ? {_LEAKY_AREA}f * reciprocal(a) : b;",
        ("w", "c"),
    ),
    "LeakyKReLU": Derivative(
        lambda leak, k: (leak, k),
        "return x >= 0.0f ? b : a;",
        ("leak", "k"),
    ),
    "Rect": Derivative(
        lambda alpha: (alpha, 0.5 / alpha),
        "return fabsf(x) < b ? a : 0.0f;",
    ),
    "S2NN": Derivative(
        lambda alpha, beta: (alpha, beta),
        "float e = exponential(-fabsf(a * x)); float r = reciprocal(1.0f + (x < 0.0f ? e : x));"
        " return x < 0.0f ? a * e * r * r : b * r;",
        ("alpha", "beta"),
    ),
    "QPseudoSpike": Derivative(
        lambda alpha: (2 / (alpha - 1), -alpha),
        "return powf(1.0f + a * fabsf(x), b);",
    ),
    "NonzeroSignLogAbs": Derivative(
        lambda alpha: (1 / alpha, 0.0),
        "return reciprocal(a + fabsf(x));",
    ),
    "LogTailedReLU": Derivative(
        lambda alpha: (alpha, 0.0),
        "return x <= 0.0f ? a : x > 1.0f ? reciprocal(x) : 1.0f;",
    ),
    "FakeNumericalGradient": Derivative(
        lambda alpha: (alpha, 1 / alpha if alpha > 0 else math.inf),
        "return fabsf(x) < b ? a : reciprocal(fabsf(x));",
    ),
    "DeterministicPass": Derivative(lambda: (0.0, 0.0), "return 1.0f;", ()),
    "MultiLevelSpikeCount": Derivative(
        lambda most, low, high: (low, high),
        "return x >= a && x <= b ? 1.0f : 0.0f;",
        ("max_spike_count", "grad_min", "grad_max"),
    ),
}
_KINDS = vars(surrogate) | {"Rect": Rect, "MultiLevelSpikeCount": MultiLevelSpikeCount}
#: The class of a step function -> its derivative; ``DERIVATIVES[Mine] = Derivative(...)`` adds one.
#: A subclass may override its parent's derivative, so it needs an entry of its own.
#: The installed version of SpikingJelly may lack a class.
DERIVATIVES: dict[type, Derivative] = {
    _KINDS[name]: derivative for name, derivative in _SPIKINGJELLYS.items() if name in _KINDS
}


#: where a module keeps hooks on its calls
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def counts(surrogate_function: Any) -> bool:
    """Whether it gives counts, of H / V_th, not spikes."""
    return isinstance(surrogate_function, MultiLevelSpikeCount)


def levels_of(surrogate_function: Any) -> int:
    """The most that a step gives: 1 for spikes.

    >>> levels_of(surrogate.ATan()), levels_of(MultiLevelSpikeCount(4))
    (1, 4)
    """
    return surrogate_function.max_spike_count if counts(surrogate_function) else 1


def by_name(name: str) -> Derivative:
    """The derivative of the class of this name.

    Raises:
        ValueError: not one class of :data:`DERIVATIVES` has it.
    """
    found = [derivative for kind, derivative in DERIVATIVES.items() if kind.__name__ == name]
    if len(found) != 1:
        raise ValueError(f"{len(found)} classes of DERIVATIVES have the name {name!r}, expected 1")
    return found[0]


def unsupported(surrogate_function: Any) -> str | None:
    """Why the table has no derivative for this surrogate, or ``None`` if it has one.

    >>> unsupported(surrogate.ATan()) is None
    True
    >>> unsupported(surrogate.ATan(spiking=False))
    'the surrogate ATan has spiking=False, which is no step function'
    """
    name = type(surrogate_function).__name__
    derivative = DERIVATIVES.get(type(surrogate_function))
    if derivative is None:
        return f"the derivative of the surrogate {name} is not in sj_taid.ops.surrogate.DERIVATIVES"
    if not getattr(surrogate_function, "spiking", True):
        return f"the surrogate {name} has spiking=False, which is no step function"
    if any(getattr(surrogate_function, hooks, None) for hooks in _HOOKS):
        return f"the surrogate {name} has hooks, which no kernel calls"
    for parameter in derivative.parameters:
        value = getattr(surrogate_function, parameter)
        if not isinstance(value, int | float):
            return (
                f"{parameter} of the surrogate {name} is a {type(value).__name__} and may learn; "
                "only a plain number is taken"
            )
    return None


def key_of(surrogate_function: Any) -> tuple[Any, ...]:
    """All that a surrogate's derivative depends on, and whether it has hooks.

    >>> key_of(surrogate.ATan(alpha=3.0)) == key_of(surrogate.ATan(alpha=2.0))
    False
    """
    kind = type(surrogate_function)
    read = _READERS.get(kind)
    if read is None:
        if kind not in DERIVATIVES:
            return kind, surrogate_function
        read = _READERS[kind] = attrgetter("__class__", *DERIVATIVES[kind].parameters)
    found = read(surrogate_function)
    for constant in found if isinstance(found, tuple) else ():
        if hasattr(constant, "__array__"):  # a number of numpy or torch, which may change
            found = (kind, *(float(c) for c in found[1:]))
            break
    hooked = False
    for hooks in _HOOKS:  # not any(), which costs a call more
        if getattr(surrogate_function, hooks, None):
            hooked = True
    return found, getattr(surrogate_function, "spiking", True), hooked


#: a class of :data:`DERIVATIVES` -> what reads the constants of its modules
_READERS: dict[type, Any] = {}


def derivative_of(surrogate_function: Any) -> tuple[str, float, float, int, tuple[float, ...]]:
    """A supported surrogate's class, its derivative's constants, the most that a step gives.

    And the class's own arguments, of which :func:`made_again` makes it.

    >>> derivative_of(surrogate.PiecewiseQuadratic(alpha=4.0))
    ('PiecewiseQuadratic', 4.0, 0.25, 1, (4.0,))
    """
    derivative = DERIVATIVES[type(surrogate_function)]
    parameters = [getattr(surrogate_function, p) for p in derivative.parameters]
    a, b = derivative.constants(*parameters)
    kind, own = type(surrogate_function).__name__, tuple(map(float, parameters))
    return kind, float(a), float(b), levels_of(surrogate_function), own


def made_again(name: str, parameters: tuple[float, ...]) -> Any:
    """The surrogate of this class and these arguments.

    >>> made_again("ATan", (3.0,)).alpha
    3.0
    """
    kind = next(kind for kind in DERIVATIVES if kind.__name__ == name)
    if kind is MultiLevelSpikeCount:
        most, low, high = parameters
        return kind(int(most), grad_window=(low, high))
    return kind(**dict(zip(DERIVATIVES[kind].parameters, parameters, strict=True)))
