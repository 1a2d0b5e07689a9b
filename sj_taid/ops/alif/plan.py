"""What a fused call knows in advance, and what a backend makes of it: a plan.

A spec holds all that does not depend on values, in one hashable tuple. A backend's
:class:`Engine` makes a plan of a spec once: kernel, partition or grid, and arguments. Each call
then allocates, fills in addresses and starts the kernel. Plans hold no state of a call, so threads
and equal layers share them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bits import packed_shape

#: the surrogate of counts, :class:`sj_taid.ops.surrogate.MultiLevelSpikeCount`
COUNT = "MultiLevelSpikeCount"


class Charge(IntEnum):
    """How the input X and the voltage V make H, by ``q = sigmoid(w)``."""

    LEAK = 0  #: H = V - q (V - V_reset) + X
    DECAY_INPUT = 1  #: H = V + q (X - (V - V_reset))
    NO_LEAK = 2  #: H = V + X
    NO_STATE = 3  #: H = X, for counts alone


class Dynamics(NamedTuple):
    """What a neuron computes: how it charges, fires and resets.

    ``w`` and ``v_threshold`` are numbers where they do not learn; ``None`` where they are tensors,
    which a call is given, or where the charge has no ``w``.
    """

    charge: Charge
    w: float | None
    v_threshold: float | None
    v_reset: float | None  #: ``None``: soft reset
    detach_reset: bool
    surrogate: str  #: the name of a class in :data:`sj_taid.ops.surrogate.DERIVATIVES`
    a: float  #: constants of its derivative
    b: float
    levels: int = 1  #: the most that a step gives
    parameters: tuple[float, ...] = ()  #: of the surrogate

    @property
    def states(self) -> int:
        return 1

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

    dynamics: Any  #: on a CPU a Reading, or Dynamics; on a GPU Dynamics
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


def spec_of(
    x_seq: Tensor,
    dynamics: Any,
    per_channel: bool,
    norm: bool = False,
    fixed_norm: bool = False,
    store_v_seq: bool = False,
    pack: bool = False,
    saves: bool = False,
) -> Spec:
    """The spec of a dense ``x_seq`` ``[T, N, *]``."""
    steps = len(x_seq)
    neurons = x_seq.numel() // steps
    channels = x_seq.shape[2] if per_channel or norm else 1
    return Spec(
        *(dynamics, x_seq.dtype, x_seq.device, steps, neurons, channels),
        x_seq.stride(2) if channels > 1 else max(neurons, 1),
        *(tuple(x_seq.shape), x_seq.stride(), per_channel, norm, fixed_norm),
        *(store_v_seq, pack, saves),
    )


class Needs(NamedTuple):
    """The gradients that a backward is asked for."""

    x: bool
    v0: bool
    w: bool
    v_threshold: bool
    norm: bool  #: weight or bias


class Plan:
    """A :class:`Spec` on a backend, which starts its kernels on what is allocated here.

    ``operands`` are x, v0, w, v_threshold and a norm's mean, rstd, weight and bias. ``x`` has the
    memory order of the spec in any shape; ``v0`` that of a step, and the neurons start at
    ``v_init`` without it. ``w`` and ``v_threshold``, where the dynamics have no number, and those
    of a norm, ``[C]``, are contiguous. All but ``x`` are float32, or ``None``.
    """

    start_forward: Callable[..., None]
    start_backward: Callable[..., None]

    def __init__(
        self,
        spec: Spec,
        dtype: torch.dtype,
        checkpoints: int,
        packs: bool,
        pack: Callable[..., Tensor],
    ) -> None:
        """``packs``: whether forward's kernel does, where asked for, and not ``pack`` after it."""
        self.spec, self.states = spec, range(spec.dynamics.states)
        on: Any = {"device": spec.device}
        step, order = (spec.shape[1:], spec.strides[1:]), (spec.shape, spec.strides)
        self.new = partial(torch.empty, dtype=torch.float32, **on)
        self.new_v = partial(torch.empty_strided, *step, dtype=torch.float32, **on)
        self.new_v_seq = partial(torch.empty_strided, *order, dtype=torch.float32, **on)
        self.new_spikes = partial(torch.empty_strided, *order, dtype=dtype, **on)
        size = packed_shape(spec.dynamics.levels, spec.steps, spec.neurons)
        self.new_bits = partial(torch.empty, size, dtype=torch.uint8, **on)
        self.checkpoint, self.has_checkpoint = (checkpoints, spec.neurons), checkpoints > 0
        self.packs, self.pack_after = spec.pack and packs, None
        if spec.pack and not packs:
            self.pack_after = partial(pack, most=spec.dynamics.levels)

    def forward(self, v_init: float, *operands: Tensor | None) -> tuple[Any, ...]:
        """Spikes, last voltage, every voltage, checkpoint and bits; ``None`` if not asked for.

        Voltages are float32, and have the ``shape`` and ``strides`` of a step, ``v_seq`` those of
        the sequence. ``checkpoint`` is what backward of a spec that ``saves`` needs besides. Bits
        are those of :func:`sj_taid.ops.bits.pack`.
        """
        outputs: list[Any] = [self.new_spikes()]
        for _ in self.states:
            outputs.append(self.new_v())
        outputs += (
            self.new_v_seq() if self.spec.store_v_seq else None,
            self.new(self.checkpoint) if self.has_checkpoint else None,
            self.new_bits() if self.packs else None,
        )
        self.start_forward(v_init, operands, outputs)
        if self.pack_after:
            outputs[-1] = self.pack_after(outputs[0])
        return tuple(outputs)

    def backward(
        self, needs: Needs, v_init: float, given: tuple[Any, ...], operands: tuple[Any, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, v0, w, v_threshold, weight and bias; ``None`` if not needed.

        ``given`` are those of spikes, last and every voltage, in the memory order of the spec, the
        first in its dtype, the others float32; and the checkpoint. The gradient of x has the shape
        and strides of x; those of parameters are float32.
        """
        channels = self.spec.channels
        size = (channels,) if self.spec.per_channel else ()
        grads = (
            torch.empty_like(operands[0]) if needs[0] else None,
            self.new_v() if needs[1] else None,
            *[self.new(size) if need else None for need in needs[2:4]],
            *[self.new(channels) if needs[-1] else None for _ in range(2)],
        )
        self.start_backward(needs, v_init, operands, given, grads)
        return grads


class Plans(dict[Any, Any]):
    """A module's plans by key; copied and pickled as none.

    A key is all that a call's plan depends on, so that no plan is ever wrong.
    """

    MOST = 64

    def __init__(self) -> None:
        super().__init__()
        #: whether on a GPU -> what a call reads of the module
        self.views: dict[bool, Any] = {}

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
    """A backend's maker of plans, and what it has in the place of functions of :mod:`..bits`."""

    plan: Callable[[Spec], Plan]
    pack: Callable[[Tensor, int], Tensor]
    unpack_into: Callable[[Tensor, Tensor], None]


#: device type -> the engine of its fused backend, which enters it when it is imported
ENGINES: dict[str, Engine] = {}


@lru_cache(maxsize=1024)
def find_plan(engine: Engine, spec: Spec) -> Plan:
    """The plan of a spec, made once for all equal calls."""
    return engine.plan(spec)


def arranged(tensor: Any, strides: tuple[int, ...]) -> Any:
    """``tensor``, or ``None``, in memory by ``strides``; a copy only where it is not."""
    if tensor is None or tensor.stride() == strides or _has_strides(tensor, strides):
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def _has_strides(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    axes = zip(tensor.stride(), strides, tensor.shape, strict=True)
    return all(stride == wanted for stride, wanted, size in axes if size != 1)
