"""ALIFNode: parameters, state and step modes; :mod:`sj_taid.functional` computes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, fx, nn

from . import functional
from ._internal import compat, graph
from ._internal.checks import (
    Rule,
    check,
    check_flags,
    check_numbers,
    check_sizes,
    is_number,
)
from .fused_neuron import FusedNeuron
from .kept.kept import Kept, leave
from .ops import backends
from .ops.step import reference
from .ops.step.reference import state_dtype
from .ops.surrogate import MultiLevelSpikeCount, is_integer, levels_of

__all__ = ["ALIFNode"]

_SIGMOID = surrogate.Sigmoid()

_TAU: Rule = (
    "a number of time steps greater than 1 and less than 1e38, or None",
    # From about 3.4e38 on, 1/sigmoid(w) is infinite in float32.
    lambda value: value is None or (is_number(value) and 1.0 < value < 1e38),
)
_FUNCTION: Rule = (
    "a function, such as surrogate.ATan()",
    lambda value: callable(value) and not isinstance(value, type),
)
_RESET: Rule = (
    "a finite number or None",
    lambda value: value is None or (is_number(value) and math.isfinite(value)),
)


class ALIFNode(FusedNeuron, compat.BaseNode):
    r"""Leaky integrate-and-fire neuron that learns its time constant *and* its threshold.

    "Adaptive" means adapted by learning; elsewhere ALIF often names a neuron whose threshold
    rises with each spike, and this is not that one.

    .. math::
        q &= \mathrm{sigmoid}(w) = 1/\tau \\
        H[t] &= V[t-1] + q\,(X[t] - (V[t-1] - V_{reset})) \quad\text{(decay\_input)} \\
        H[t] &= V[t-1] - q\,(V[t-1] - V_{reset}) + X[t] \quad\text{(otherwise)} \\
        S[t] &= \Theta(H[t] - V_{th}) \\
        V[t] &= (1 - S[t])\,H[t] + S[t]\,V_{reset} \quad\text{(hard)},\qquad
        V[t] = H[t] - S[t]\,V_{th} \quad\text{(soft)}

    Takes the arguments of SpikingJelly's ``ParametricLIFNode`` with the same defaults. Input
    ``[N, *]`` in step mode ``"s"``, ``[T, N, *]`` in ``"m"``; spikes of the same shape and dtype.

    Args:
        init_tau: initial membrane time constant in time steps, > 1 and < 1e38. ``None``, for counts
            alone, is a neuron without state: :math:`H[t] = X[t]`, there is no ``w``, and
            ``decay_input`` and ``v_reset`` say nothing.
        decay_input: whether the input is scaled by ``1/tau`` too.
        v_threshold: initial threshold voltage, dimensionless.
        v_reset: the voltage after a spike; ``None`` subtracts the threshold instead (soft reset).
        surrogate_function: SpikingJelly surrogate that stands for the step's derivative.
        detach_reset: leave the reset out of the gradient.
        step_mode: ``"s"`` (one step per call) or ``"m"`` (a sequence per call).
        store_v_seq: store the voltage of every step in ``v_seq``.
        backend: one of :func:`sj_taid.ops.backends.names`; ``"auto"`` takes the fastest that
            works here, any other name runs or raises.
        channels: ``None`` for one tau and one threshold per layer (the paper), or the number of
            channels ``C`` for one pair per channel of ``[T, N, C, *]``.
        learn_tau: whether ``w`` receives a gradient.
        learn_threshold: whether ``v_threshold`` receives a gradient.
        min_v_threshold: lower bound of the threshold used; ``None`` leaves it free (the paper).
        levels: the most that a step gives, up to 14. With D > 1 the neuron gives counts
            :math:`S = \mathrm{round}(\mathrm{clamp}(H / V_{th}, 0, D))`, half to even, with the
            gradient :math:`1 / V_{th}` where :math:`0 \le H / V_{th} \le D`, and needs
            ``v_reset=None``. For another window give ``surrogate_function=
            sj_taid.ops.surrogate.MultiLevelSpikeCount(D, grad_window=(low, high))`` instead.
            I-LIF (arXiv 2407.20708) has ``init_tau=4/3, decay_input=False``.
        normalize: divide the counts by D, so that a step gives 0 to 1.

    Attributes:
        w: ``-log(tau - 1)``, float32, a scalar or ``[C]``; ``None`` without state.
        v_threshold: float32, a scalar or ``[C]``.

    Both parameters and the state ``v`` stay float32 under ``.half()`` and ``.bfloat16()``: in
    half precision an optimiser's small steps would round to nothing.

    Raises:
        ValueError: an argument out of its range; at a call, shapes or devices that do not fit.
        TypeError: at a call, an input that is not floating point, or a proxy of torch.fx, as in
            NIR export, which needs :func:`~sj_taid.to_lif`.

    Source: Qiu et al., *When Spiking neural networks meet temporal attention image decoding and
    adaptive spiking neuron*, ICLR Tiny Papers 2023, arXiv 2406.03046.

    >>> node = ALIFNode(init_tau=2.0, v_threshold=0.7, step_mode="m")
    >>> node(torch.ones(3, 1)).flatten().tolist()  # H = 0.5, 0.75 (fires), 0.5
    [0.0, 1.0, 0.0]
    >>> sorted(node.state_dict())
    ['v_threshold', 'w']
    >>> node = ALIFNode(levels=4, v_reset=None, decay_input=False, step_mode="m")
    >>> node(torch.tensor([[2.7], [1.0], [9.0]])).flatten().tolist()  # H = 2.7, 0.85, 8.925
    [3.0, 1.0, 4.0]
    >>> node = ALIFNode(init_tau=None, levels=4, normalize=True)
    >>> node(torch.tensor([2.7, -1.0, 9.0])).tolist()
    [0.75, 0.0, 1.0]
    """

    w: Any

    def __init__(
        self,
        init_tau: float | None = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Callable[[Tensor], Tensor] = _SIGMOID,
        detach_reset: bool = False,
        step_mode: str = "s",
        store_v_seq: bool = False,
        *,
        backend: str = backends.AUTO,
        channels: int | None = None,
        learn_tau: bool = True,
        learn_threshold: bool = True,
        min_v_threshold: float | None = None,
        levels: int = 1,
        normalize: bool = False,
    ) -> None:
        check(_TAU, init_tau=init_tau)
        check_flags(
            decay_input=decay_input,
            detach_reset=detach_reset,
            store_v_seq=store_v_seq,
            learn_tau=learn_tau,
            learn_threshold=learn_threshold,
            normalize=normalize,
        )
        check_numbers(v_threshold=v_threshold)
        check(_FUNCTION, surrogate_function=surrogate_function)
        check(_RESET, v_reset=v_reset)
        if channels is not None:
            check_sizes(channels=channels)
        v_threshold = float(v_threshold)
        v_reset = None if init_tau is None else v_reset  # without state there is no reset
        surrogate_function = _counting(levels, surrogate_function)
        functional.check_counts(surrogate_function, v_reset, init_tau is not None)
        _check_threshold(v_threshold, min_v_threshold, surrogate_function)
        if normalize and levels_of(surrogate_function) == 1:
            raise ValueError("normalize=True divides counts: take levels= of more than 1")
        super().__init__(
            v_threshold,
            None if v_reset is None else float(v_reset),
            surrogate_function,
            detach_reset,
            step_mode=step_mode,
            store_v_seq=store_v_seq,
        )
        # The id of the voltage that the last forward ended with, and its recomputation.
        self._end: tuple[int, int | None] = 0, None
        self.backend = backend
        self.decay_input = decay_input
        self.channels = None if channels is None else int(channels)
        self.min_v_threshold = min_v_threshold
        self.normalize = normalize
        shape = () if channels is None else (channels,)
        dtype = state_dtype(torch.get_default_dtype())
        w = None
        if init_tau is not None:
            start = torch.full(shape, -math.log(init_tau - 1.0), dtype=dtype)
            w = nn.Parameter(start, requires_grad=learn_tau)
        self.register_parameter("w", w)
        # SpikingJelly's BaseNode insists on a float; the parameter takes its place.
        self.v_threshold = nn.Parameter(
            torch.full(shape, v_threshold, dtype=dtype), requires_grad=learn_threshold
        )

    @property
    def name(self) -> str:
        """The path in the net that :func:`sj_taid.name_neurons` has stored, or ``""``."""
        return self._taid_name

    @property
    def backend(self) -> str:
        """The backend asked for, one of ``supported_backends``."""
        return self._fused_backend

    @backend.setter
    def backend(self, value: str) -> None:
        self._fused_backend = backends.check_name(value)

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """The names that ``backend`` takes."""
        return backends.names()

    @property
    def levels(self) -> int:
        """The most that a step gives: 1 for spikes.

        >>> ALIFNode(levels=4, v_reset=None).levels
        4
        """
        return levels_of(self.surrogate_function)

    @property
    def tau(self) -> Tensor | None:
        """The membrane time constant ``1/sigmoid(w)`` in time steps, a scalar or ``[C]``.

        ``None`` without state.

        >>> round(ALIFNode(init_tau=4.0).tau.item(), 4)
        4.0
        """
        return None if self.w is None else 1.0 / self.w.sigmoid()

    @property
    def effective_v_threshold(self) -> Tensor:
        """The threshold used: ``v_threshold``, kept at or above ``min_v_threshold``."""
        if self.min_v_threshold is None:
            return self.v_threshold
        return functional.lower_bound(self.v_threshold, self.min_v_threshold)

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], step_mode: str
    ) -> tuple[Any, ...]:
        """Check input and state, and return the state as it is: a float is a valid start."""
        if isinstance(inputs[0], fx.Proxy):
            raise TypeError(
                "torch.fx, which NIR export traces a net with, cannot trace ALIF; give it a copy "
                "with plain LIF neurons: sj_taid.to_lif(net)"
            )
        if not isinstance(inputs[0], Tensor):
            got = type(inputs[0]).__name__
            raise TypeError(f"the input must be a floating-point tensor, but it is {got}")
        self._check_recomputation(states[0])
        return states

    def step(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One step of ``[N, *]`` in plain torch: the spikes or counts, and the next ``V``.

        This is the definition, and what the loops of a CPU are made of.
        """
        q = None if self.w is None else reference.per_channel(self.w.sigmoid(), x)
        return reference.step(
            x, v, q, reference.per_channel(self.effective_v_threshold, x), **self._options()
        )

    def _options(self) -> dict[str, Any]:
        names = "decay_input", "v_reset", "detach_reset", "surrogate_function"
        return {name: getattr(self, name) for name in names}

    # A call gives the bounded threshold: its gradient is bounded as a sum over all steps.
    _taid_step = staticmethod(reference.run_step)

    def _taid_tensors(self) -> tuple[Tensor, ...]:
        v_threshold = self.effective_v_threshold
        return (v_threshold,) if self.w is None else (self.w, v_threshold)

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """One step ``[N, *]`` with explicit state; nothing on the module changes."""
        x_seq = inputs[0].unsqueeze(0)
        (spike_seq,), states = self.multi_step_functional_forward((x_seq,), states)
        return (spike_seq[0],), states

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """A sequence ``[T, N, *]`` with explicit state; nothing on the module changes."""
        spike_seq, v, *_ = self._taid_run(inputs[0], {"v": states[0]}, False)
        return (self._scale(spike_seq),), (v,)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """A sequence ``[T, N, *]`` from the state ``v``, which is updated."""
        store_v_seq = self.store_v_seq
        (v,) = self.materialize_states((x_seq,), (self.v,), "m")
        spike_seq, self.v, v_seq = self._taid_run(x_seq, {"v": v}, store_v_seq)
        if store_v_seq:
            self.v_seq = v_seq
        return self._scale(spike_seq)

    def _scale(self, spike_seq: Tensor) -> Tensor:
        return spike_seq / self.levels if self.normalize else spike_seq

    def _taid_check(self, x_seq: Tensor, states: dict[str, Any]) -> None:
        parameters = self.w, self.effective_v_threshold
        functional.check_call(x_seq, states["v"], *parameters, self._taid_label)
        functional.check_counts(self.surrogate_function, self.v_reset, self.w is not None)

    def _taid_definition(
        self,
        x_seq: Tensor,
        states: dict[str, Any],
        store_v_seq: bool,
        backend: str | None = None,
    ) -> tuple[Any, ...]:
        x_seq = leave(x_seq) if isinstance(x_seq, Kept) else x_seq
        return functional.alif_multi_step(
            x_seq,
            states["v"],
            self.w,
            self.effective_v_threshold,
            store_v_seq=store_v_seq,
            backend=backend or self.backend,
            **self._options(),
        )

    def extra_repr(self) -> str:
        with torch.no_grad():
            tau, threshold = map(_range, (self.tau, self.effective_v_threshold))
        levels = f"levels={self.levels}, " if is_integer(self.surrogate_function) else ""
        levels += "normalize=True, " if self.normalize else ""
        return (
            f"tau={tau}, v_threshold={threshold}, v_reset={self.v_reset}, {levels}"
            f"decay_input={self.decay_input}, detach_reset={self.detach_reset}, "
            f"channels={self.channels}, step_mode={self.step_mode}, backend={self.backend}"
        )

    def _taid_run(
        self, x_seq: Tensor, states: dict[str, Any], store_v_seq: bool
    ) -> tuple[Any, ...]:
        results: Any = super()._taid_run(x_seq, states, store_v_seq)
        if results is None:  # its step is not read, as of a surrogate with hooks
            results = self._taid_definition(x_seq, states, store_v_seq, "torch")
        if self.w is None:
            return results[0], states["v"], *results[2:]
        if not torch.compiler.is_compiling():
            self.__dict__["_end"] = id(results[1]), graph.recomputation()
        return results

    def _check_recomputation(self, v: Any) -> None:
        if torch.compiler.is_compiling() or (node := graph.recomputation()) is None:
            return
        end, made_in = self._end
        if id(v) == end and made_in != node:
            raise RuntimeError(
                f"{self._taid_label()} is recomputed in a backward (gradient checkpointing) from "
                "the voltage that its forward ended with, not the one it started from: checkpoint "
                "with SpikingJelly 2's memopt.checkpoint_module(net), which keeps the states, or "
                "reset inside the function: "
                "checkpoint(lambda x: (functional.reset_net(net), net(x))[1], x)"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        threshold, bound = self.v_threshold.detach(), self.min_v_threshold
        if bound is not None and not threshold.is_meta and threshold.lt(bound).any():
            warnings.warn(
                f"{prefix}v_threshold={threshold.min().item():.4g} was loaded, below "
                f"min_v_threshold={bound:.4g} of this net, which takes its place: to keep what was "
                "saved, give ALIFNode or swap_neurons min_v_threshold=None, or the saved net's",
                stacklevel=2,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> nn.Module:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lowered = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device, torch.float32) if lowered else moved

        return super()._apply(keep_float32)


def _counting(levels: int, surrogate_function: Any) -> Any:
    """The surrogate of a neuron of ``levels``."""
    check_sizes(levels=levels)
    if levels == 1 or (is_integer(surrogate_function) and levels_of(surrogate_function) == levels):
        return surrogate_function
    if surrogate_function is not _SIGMOID:
        raise ValueError(
            f"levels={levels} has the surrogate MultiLevelSpikeCount({levels}), but "
            f"surrogate_function is {surrogate_function!r}; leave one of the two out"
        )
    return MultiLevelSpikeCount(levels)


def _check_threshold(v_threshold: float, least: Any, surrogate_function: Any) -> None:
    """Refuse a threshold below its bound, or one that counts cannot be divided by."""
    if is_integer(surrogate_function) and not v_threshold > 0.0:
        raise ValueError(
            "a neuron that counts divides by its threshold: v_threshold must be more than 0, "
            f"but it is {v_threshold}"
        )
    if least is None:
        return
    check_numbers(min_v_threshold=least)
    if v_threshold < least:
        raise ValueError(
            f"v_threshold={v_threshold} is not >= min_v_threshold={least}; "
            "start at or above the bound"
        )


def _range(parameter: Tensor | None) -> str:
    if parameter is None:
        return "None"
    if parameter.is_meta:
        return "?"
    lowest, highest = (f"{value.item():.4g}" for value in parameter.aminmax())
    return f"{lowest}..{highest}" if parameter.dim() else lowest
