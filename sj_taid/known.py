"""What a net's own classes compute, for ``sj_taid.accelerate(net, known={Class: description})``.

>>> import sj_taid
>>> from sj_taid import known
>>> class MultiSpike(torch.nn.Module):
...     def forward(self, x):
...         return x.clamp(0, 4).round() / 4
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), MultiSpike())
>>> counts = known.IntegerLIF(tau=None, levels=4, divisor=4)
>>> report = sj_taid.accelerate(net, known={MultiSpike: counts}, check=False)
>>> report.rows[0].done
'fused operator'
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from spikingjelly.activation_based import surrogate

from ._checks import (
    POSITIVE,
    Rule,
    are_two_numbers,
    check,
    check_flags,
    check_numbers,
    integer,
    is_whole,
)
from .neurons import why_no_w
from .ops.bits import LARGEST_BYTE
from .ops.surrogate import MultiLevelSpikeCount, key_of, unsupported

__all__ = ["LIF", "BatchNorm", "IntegerLIF"]


_NAME: Rule = ("a name or None", lambda name: name is None or isinstance(name, str))
_COUNT: Rule = ("an integer from 1 to 255", lambda n: is_whole(n) and 1 <= n <= LARGEST_BYTE)


class Description:
    """What a class computes; its ``repr`` has what differs from the defaults."""

    def __repr__(self) -> str:
        given: Any = ((f, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        said = [
            f"{f.name}={value!r}"
            for f, value in given
            if f.default is MISSING or value != f.default
        ]
        return f"{type(self).__name__}({', '.join(said)})"

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """A hashable key, equal for equal descriptions."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        function = values.pop("surrogate_function", None)
        return type(self), *values.values(), function and key_of(function)


@dataclass(frozen=True, kw_only=True, repr=False)
class Neuron(Description):
    """What the descriptions of neurons have in common.

    Attributes:
        time_axis: the axis of time of the input and the output.
        voltage: the attribute that keeps the voltage after the reset from one call to the next, a
            tensor, a number or ``None``; ``None`` here if each call starts from 0.
    """

    tau: float | None
    v_threshold: float = 1.0
    v_reset: float | None = None
    decay_input: bool = False
    detach_reset: bool = False
    time_axis: int = 0
    voltage: str | None = None

    def __post_init__(self) -> None:
        check_numbers(v_threshold=self.v_threshold)
        check(integer(0), time_axis=self.time_axis)
        check_flags(decay_input=self.decay_input, detach_reset=self.detach_reset)
        check(_NAME, voltage=self.voltage)
        if self.tau is not None:
            check_numbers(tau=self.tau)
            if reason := why_no_w(self.tau):
                raise ValueError(f"no such neuron: {reason}")


@dataclass(frozen=True, kw_only=True, repr=False)
class LIF(Neuron):
    r"""A leaky integrate-and-fire neuron.

    .. math::
        H[t] &= V[t-1] - \frac{1}{\tau} (V[t-1] - V_{reset}) + X[t] \\
        S[t] &= 1 \text{ if } H[t] \ge V_{th}, \text{ else } 0

    then H is reset to ``v_reset`` where it fired (``None``: by subtracting ``v_threshold``). A
    neuron that is written ``mem = mem * decay + x`` has ``tau = 1 / (1 - decay)``.

    Args:
        tau: membrane time constant in time steps, above 1.
        v_threshold: threshold voltage.
        v_reset: the voltage after a spike; ``None`` is a soft reset.
        decay_input: the input is divided by tau.
        detach_reset: the reset passes no gradient on.
        surrogate_function: the derivative of a spike, one of SpikingJelly's.
        strict: it fires where H is *above* the threshold, not at it. The threshold is then the next
            larger float32.
        time_axis, voltage: see :class:`Neuron`.

    Raises:
        ValueError: a bad argument, or a surrogate that the fused neuron does not have.
    """

    tau: float = 2.0
    v_reset: float | None = 0.0
    surrogate_function: Any = field(default_factory=surrogate.Sigmoid)
    strict: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(tau=self.tau)
        if reason := unsupported(self.surrogate_function):
            raise ValueError(f"surrogate_function: {reason}")

    @property
    def threshold(self) -> float:
        """The least voltage that fires."""
        if not self.strict:
            return float(self.v_threshold)
        threshold = torch.tensor(self.v_threshold, dtype=torch.float32, device="cpu")
        return torch.nextafter(threshold, torch.full_like(threshold, torch.inf)).item()

    divisor = 1.0


@dataclass(frozen=True, kw_only=True, repr=False)
class IntegerLIF(Neuron):
    r"""A neuron that gives counts (I-LIF), or rounds its input to them.

    .. math::
        H[t] &= (1 - 1/\tau) V[t-1] + X[t] \\
        S[t] &= \mathrm{round}(\mathrm{clamp}(H[t] / V_{th}, 0, D)) \\
        V[t] &= H[t] - S[t] V_{th}

    with the gradient :math:`1/V_{th}` of S where :math:`H / V_{th}` is in the window.

    Args:
        tau: membrane time constant in time steps; ``None`` is no state, H = X.
        levels: the largest count D.
        v_threshold: threshold voltage.
        detach_reset: the subtracted count passes no gradient on.
        window: bounds of the window, included; by default 0 and D.
        divisor: the count is divided by it.
        time_axis, voltage: see :class:`Neuron`.

    Raises:
        ValueError: a bad argument, a hard reset, or ``decay_input``.

    Source: Luo et al. 2024, arXiv 2407.20708; without state Yao et al. 2024, arXiv 2411.16061.
    """

    levels: int = 4
    window: tuple[float, float] | None = None
    divisor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(_COUNT, levels=self.levels)
        check(POSITIVE, v_threshold=self.v_threshold, divisor=self.divisor)
        window = self.window
        if window is not None and not (are_two_numbers(window) and window[0] <= window[1]):
            raise ValueError(f"window must be two numbers, the lower first, but it is {window!r}")
        object.__setattr__(self, "window", window and tuple(window))  # a list is no key
        if self.v_reset is not None or self.decay_input:
            raise ValueError("counts have a soft reset, v_reset=None, and decay_input=False")

    @property
    def threshold(self) -> float:
        return self.v_threshold

    @property
    def surrogate_function(self) -> Any:
        return MultiLevelSpikeCount(self.levels, grad_window=self.window)


@dataclass(frozen=True, kw_only=True, repr=False)
class BatchNorm(Description):
    r"""A subclass of torch's batch norm that scales what it normalises, such as tdBN.

    .. math:: y = \text{scale} \cdot \text{weight} \frac{x - \mu}{\sqrt{\sigma^2 + eps}} + bias

    Args:
        scale: a constant, as ``alpha * V_th``.
        scales_bias: the bias is scaled too.
        channel_axis: the axis of channels; 2 where the input is ``[T, N, C, *]``.

    Raises:
        ValueError: a bad argument.
    """

    scale: float = 1.0
    scales_bias: bool = False
    channel_axis: int = 1

    def __post_init__(self) -> None:
        check_numbers(scale=self.scale)
        check_flags(scales_bias=self.scales_bias)
        if self.channel_axis not in (1, 2):
            raise ValueError(f"channel_axis must be 1 or 2, but it is {self.channel_axis!r}")
