"""What a fused call knows in advance, and what a backend makes of it: a plan.

A spec holds all that does not depend on values, in one hashable tuple. A backend's
:class:`Engine` makes a plan of a spec once: kernel, partition or grid, and arguments. Each call
then allocates, fills in addresses and starts the kernel. Plans hold no state of a call, so threads
and equal layers share them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

#: the surrogate of counts, :class:`sj_taid.ops.surrogate.MultiLevelSpikeCount`
COUNT = "MultiLevelSpikeCount"


class Dynamics(NamedTuple):
    """What a neuron computes: how it charges, fires and resets.

    ``w`` and ``v_threshold`` are numbers where they do not learn; ``None`` where they are tensors,
    which a call is given. A ``w`` of -inf is no leak: then H = V + X, for an infinite V too. One of
    inf, of counts alone, is no state: H = X.
    """

    w: float | None
    decay_input: bool
    v_threshold: float | None
    v_reset: float | None  #: ``None``: soft reset
    detach_reset: bool
    surrogate: str  #: the name of an entry of :data:`sj_taid.ops.surrogate.DERIVATIVES`
    a: float  #: constants of its derivative
    b: float
    levels: int = 1  #: the most that a step gives

    @property
    def counts(self) -> bool:
        """Whether a step gives a count, after which the reset is soft, not a spike."""
        return self.surrogate == COUNT


class Spec(NamedTuple):
    """A call of a neuron, or of a norm and a neuron.

    The input is dense with time outermost in memory, any order of the other axes: neuron ``i`` of
    a step, in memory order, has channel ``i // inner % channels``. Spikes, voltages and their
    gradients have the same memory order; ``shape`` ``[T, *]`` and ``strides`` are how they show it.
    """

    dynamics: Dynamics
    dtype: torch.dtype
    device: torch.device
    steps: int
    neurons: int
    channels: int  #: 1 without a norm and parameters per channel
    inner: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    per_channel: bool  #: whether w and the threshold are ``[C]``, not scalars
    norm: bool
    fixed_norm: bool  #: whether its statistics are the running ones
    store_v_seq: bool
    pack: bool  #: whether forward gives the spikes as bits too, or the counts packed
    saves: bool  #: whether a backward may follow


class NormSpec(NamedTuple):
    """A call of a batch norm on ``[M, C, *]``: ``size`` values, in memory as in :class:`Spec`."""

    dtype: torch.dtype
    device: torch.device
    size: int
    channels: int
    inner: int
    fixed: bool  #: whether the statistics are the running ones
    momentum: float | None  #: ``None``: the plain average over all batches
    eps: float


class Needs(NamedTuple):
    """The gradients that a backward is asked for."""

    x: bool
    v0: bool
    w: bool
    v_threshold: bool
    norm: bool  #: weight or bias


class Plan(Protocol):
    """A :class:`Spec` on a backend."""

    def forward(
        self,
        x: Tensor,
        v0: Tensor | None,
        v_init: float,
        w: Tensor | None,
        v_threshold: Tensor | None,
        numbers: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Spikes, last voltage, every voltage, checkpoint and bits; ``None`` if not asked for.

        ``x`` has the memory order of the spec in any shape; ``v0`` that of a step, and the neurons
        start at ``v_init`` without it. ``w`` and ``v_threshold``, where the dynamics have no
        number, are contiguous. ``v0``, ``w``, ``v_threshold`` and voltages are float32, and
        voltages have the ``shape`` and ``strides`` of a step, ``v_seq`` the sequence's.
        ``checkpoint`` is what backward of a spec that ``saves`` needs besides. Bits are those of
        :mod:`sj_taid.ops.bits`. With a norm ``numbers`` are from its :class:`NormPlan`.
        """

    def backward(
        self,
        needs: Needs,
        grad_spike: Tensor | None,
        grad_v: Tensor | None,
        grad_v_seq: Tensor | None,
        x: Tensor,
        v0: Tensor | None,
        v_init: float,
        w: Tensor | None,
        v_threshold: Tensor | None,
        checkpoint: Tensor | None,
        numbers: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, v0, w, v_threshold, weight and bias; ``None`` if not needed.

        The given ones have the memory order of the spec, ``grad_spike`` its dtype, the others
        float32. The gradient of x has x's shape and strides; gradients of parameters are float32.
        """


class NormPlan(Protocol):
    """A :class:`NormSpec` on a backend."""

    def numbers(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        batches: Tensor | None,
    ) -> Tensor:
        """The norm of ``x`` per channel; moves the running statistics and counts the batch.

        All but ``batches``, int64 ``[]`` and counted where given, are contiguous float32 ``[C]``.
        With ``fixed`` the running statistics are read instead, and ``x`` is not.

        Returns 64-bit words ``[5, C]``: two rows of float64 (:func:`mean_and_rstd`), mean and
        ``r = (var + eps)^(-1/2)``, then six of float32 in the memory of three (:func:`table`):
        shift, gain, offset, weight, bias, and one unused. The norm is
        ``(x - shift) gain + offset``, with the gain ``weight r``, the shift the mean rounded to
        float32, and the offset ``bias + (shift - mean) gain`` computed in float64. Their dtype is
        int64, which hooks on saved tensors that round floats leave alone.
        """


def mean_and_rstd(numbers: Tensor) -> Tensor:
    """The float64 rows ``[2, C]`` of a :class:`NormPlan`'s numbers."""
    return numbers[:2].view(torch.float64)


def table(numbers: Tensor) -> Tensor:
    """The float32 rows ``[6, C]`` of a :class:`NormPlan`'s numbers."""
    return numbers[2:].view(torch.float32).view(6, -1)


class Plans(dict[Any, Any]):
    """A module's plans by key; copied and pickled as none.

    A key is all that a call's plan depends on, so that no plan is ever wrong.
    """

    MOST = 64

    @classmethod
    def of(cls, module: Any) -> Plans:
        """Those of a module."""
        attributes = vars(module)
        found = attributes.get("_taid_plans")
        return attributes.setdefault("_taid_plans", cls()) if found is None else found

    def keep(self, key: Any, plan: Any) -> Any:
        """Store a plan and return it; forget the oldest of too many, since shapes may vary."""
        if len(self) >= self.MOST:
            with suppress(RuntimeError, StopIteration):  # another thread keeps one, or forgets
                self.pop(next(iter(self)), None)
        self[key] = plan
        return plan

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Plans, ()


class Engine(NamedTuple):
    """A backend's makers of plans, and bits of spikes."""

    plan: Callable[[Spec], Plan]
    norm: Callable[[NormSpec], NormPlan]
    #: spikes, dense with time outermost, as ``[T, neurons]`` -> bits
    pack: Callable[[Tensor], Tensor]
    #: bits, and spikes ``[T, neurons]`` that they are written into
    unpack_into: Callable[[Tensor, Tensor], None]
    #: the same of flat counts up to 15
    pack_counts: Callable[[Tensor], Tensor]
    unpack_counts_into: Callable[[Tensor, Tensor], None]
    #: T, dtype -> how many voltages per neuron forward saves for backward's recomputation
    checkpoints: Callable[[int, torch.dtype], int] = lambda steps, dtype: 0


@lru_cache(maxsize=1024)
def find_plan(engine: Engine, spec: Spec) -> Plan:
    """The plan of a spec, made once for all equal calls."""
    return engine.plan(spec)


@lru_cache(maxsize=1024)
def find_norm_plan(engine: Engine, spec: NormSpec) -> NormPlan:
    """The plan of a norm's spec, made once for all equal calls."""
    return engine.norm(spec)
