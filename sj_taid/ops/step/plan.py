"""What a fused call knows in advance, and what a backend makes of it: a plan.

A spec holds all that does not depend on values, in one hashable tuple. A backend's
:class:`Engine` makes a plan of a spec once: kernel, partition or grid, and arguments. Each call
then allocates, fills in addresses and starts the kernel. Plans hold no state of a call, so threads
and equal layers share them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from operator import and_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bits import packed_shape
from .program import Reading


class Spec(NamedTuple):
    """A call of a neuron, or of a norm and a neuron.

    The input is dense with time outermost in memory, any order of the other axes: neuron ``i`` of
    a step, in memory order, has channel ``i // inner % channels``. Spikes, voltages and their
    gradients have the same memory order; ``shape`` ``[T, *]`` and ``strides`` are how they show it.
    """

    reading: Reading  #: of the neuron's step
    dtype: torch.dtype
    device: torch.device
    steps: int
    neurons: int
    channels: int  #: 1 without a norm and values of parameters per channel
    inner: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    norm: bool
    fixed_norm: bool  #: whether its statistics are the running ones
    store_v_seq: bool
    pack: bool  #: whether forward gives the spikes as bits too, or the counts packed
    saves: bool  #: whether a backward may follow


def spec_of(
    x_seq: Tensor,
    reading: Reading,
    norm: bool = False,
    fixed_norm: bool = False,
    store_v_seq: bool = False,
    pack: bool = False,
    saves: bool = False,
) -> Spec:
    """The spec of a dense ``x_seq`` ``[T, N, *]``."""
    steps = len(x_seq)
    neurons = x_seq.numel() // steps
    channels = x_seq.shape[2] if reading.per_channel or norm else 1
    return Spec(
        *(reading, x_seq.dtype, x_seq.device, steps, neurons, channels),
        x_seq.stride(2) if channels > 1 else max(neurons, 1),
        *(tuple(x_seq.shape), x_seq.stride(), norm, fixed_norm),
        *(store_v_seq, pack, saves),
    )


class Plan:
    """A :class:`Spec` on a backend, which starts its kernels on what is allocated here.

    ``operands`` are x, the states before the first step, the parameters, and a norm's mean, rstd,
    weight and bias. ``x`` has the memory order of the spec in any shape, states that of a step. A
    state that is ``None`` starts at its number in ``v_init``. All but ``x`` are float32.
    """

    #: starts forward's kernels on ``v_init``, operands (with values of parameters for parameters)
    #: and outputs
    start_forward: Callable[..., None]
    #: ``prepare(needs, wanted, used)`` gives what starts backward's: on ``v_init``, the same
    #: operands, ``upstream``, the gradients of x, states, weight and bias, and the totals that are
    #: ``wanted``; ``used`` is what :meth:`.Program.used` says of each step
    prepare: Callable[[Any, tuple[int, ...], Any], Callable[..., None]]

    def __init__(
        self,
        spec: Spec,
        dtype: torch.dtype,
        checkpoints: int,
        packs: bool,
        pack: Callable[..., Tensor],
    ) -> None:
        """``packs``: whether forward's kernel does, where asked for, and not ``pack`` after it."""
        self.spec, self.states = spec, range(spec.reading.states)
        self.first = 1 + spec.reading.states  #: where parameters are among the operands
        self.last = self.first + spec.reading.parameters
        self.before = spec.reading.formulas.before(spec.device)
        self.backwards: dict[Any, Any] = {}
        on: Any = {"device": spec.device}
        step, order = (spec.shape[1:], spec.strides[1:]), (spec.shape, spec.strides)
        self.new = partial(torch.empty, dtype=torch.float32, **on)
        self.new_v = partial(torch.empty_strided, *step, dtype=torch.float32, **on)
        self.new_v_seq = partial(torch.empty_strided, *order, dtype=torch.float32, **on)
        self.new_spikes = partial(torch.empty_strided, *order, dtype=dtype, **on)
        self.new_like: Callable[..., Tensor] = torch.empty_like
        size = packed_shape(spec.reading.levels, spec.steps, spec.neurons)
        self.new_bits = partial(torch.empty, size, dtype=torch.uint8, **on)
        self.checkpoint, self.has_checkpoint = (checkpoints, spec.neurons), checkpoints > 0
        self.packs, self.pack_after = spec.pack and packs, None
        if spec.pack and not packs:
            least, levels = spec.reading.least or 0, spec.reading.levels
            self.pack_after = partial(_pack_above, pack, levels, least)

    def forward(self, v_init: Any, *operands: Tensor | None) -> tuple[Any, ...]:
        """Spikes, last states, every voltage, checkpoint and bits; ``None`` if not asked for.

        States are float32, and have the ``shape`` and ``strides`` of a step, ``v_seq``, every value
        of the first, those of the sequence. ``checkpoint`` is what backward of a spec that
        ``saves`` needs besides. Bits are those of :func:`sj_taid.ops.bits.pack`.
        """
        outputs: list[Any] = [self.new_spikes()]
        for _ in self.states:
            outputs.append(self.new_v())
        outputs += (
            self.new_v_seq() if self.spec.store_v_seq else None,
            self.new(self.checkpoint) if self.has_checkpoint else None,
            self.new_bits() if self.packs else None,
        )
        if self.first < self.last:
            operands = self._operands(operands)
        self.start_forward(v_init, operands, outputs)
        if self.pack_after:
            outputs[-1] = self.pack_after(outputs[0])
        return tuple(outputs)

    def _operands(self, tensors: Any) -> Any:
        """The tensors of a call; in place of parameters, the values that a step needs of them."""
        first, last = self.first, self.last
        return *tensors[:first], *self.before(*tensors[first:last]), *tensors[last:]

    def backward(
        self, needs: Any, v_init: Any, upstream: tuple[Any, ...], operands: tuple[Any, ...]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, states, parameters, weight and bias; ``None`` if not needed.

        So are those that torch has none of. ``needs`` says of which, once of weight and bias.
        ``upstream`` are those of spikes, last states and every voltage, in the memory order of the
        spec, the first in its dtype, the others float32; and the checkpoint. The gradient of x has
        the shape and strides of x; those of parameters are float32.
        """
        first, last = self.first, self.last
        used: list[bool] = []
        for grad in upstream[: first + 1]:
            used.append(grad is not None)
        known = self.backwards.get((needs, *used))
        needs, start, shapes, after = known or self._prepare(needs, *used)
        grad_x = self.new_like(operands[0]) if needs[0] else None
        grad_v0: list[Any] = []
        for need in needs[1:first]:
            grad_v0.append(self.new_v() if need else None)
        weight = self.new(self.spec.channels) if needs[-1] else None
        bias = self.new(self.spec.channels) if needs[-1] else None
        totals: list[Any] = []
        for shape in shapes:
            totals.append(shape if shape is None else self.new(shape))
        parameters = operands[first:last]
        if first < last:
            operands = self._operands(operands)
        start(v_init, *operands, *upstream, grad_x, *grad_v0, weight, bias, *totals)
        learned: list[Any] = [None] * (last - first)
        if after is not None:
            values = operands[first : first + self.spec.reading.operands]
            learned = after(*parameters, *values, *totals)
        return grad_x, *grad_v0, *learned, weight, bias

    def _prepare(self, needs: Any, *used: bool) -> Any:
        """The needs, what starts kernels, totals' shapes, and what makes gradients of totals.

        The needs are those that there is a way to from what is ``used``; the shape is ``None`` for
        a total that is not needed.
        """
        key, reading = (needs, *used), self.spec.reading
        each, found = reading.program.used(used[:-1], used[-1], self.spec.steps)
        needs = tuple(map(and_, needs, (*found, found[0])))
        formulas, learns = reading.formulas, needs[self.first : self.last]
        wanted = formulas.totals_of(learns)
        shapes = [s if k in wanted else None for k, s in enumerate(formulas.total_shapes)]
        after = formulas.after(learns, self.spec.device) if any(learns) else None
        start = self.prepare(needs, wanted, each) if any(needs) else _nothing
        return self.backwards.setdefault(key, (needs, start, shapes, after))


def _nothing(*tensors: Any) -> None: ...


def _pack_above(pack: Any, levels: int, least: int, values: Tensor) -> Tensor:
    return pack(values - least if least else values, levels)


class Plans(dict[Any, Any]):
    """A module's plans by key; copied and pickled as none.

    A key is all that a call's plan depends on, so that no plan is ever wrong.
    """

    MOST = 64

    def __init__(self) -> None:
        super().__init__()
        self.view: Any = None  #: what a call reads of the module

    @classmethod
    def of(cls, module: Any) -> Plans:
        """The plans that a module has, made with its first call."""
        attributes = vars(module)
        found = attributes.get("_taid_plans")
        return attributes.setdefault("_taid_plans", cls()) if found is None else found

    def store(self, key: Any, plan: Any) -> Any:
        """Store a plan and return it; forget the oldest of too many, since shapes may vary."""
        if len(self) >= self.MOST:
            with suppress(RuntimeError, StopIteration):  # another thread keeps one, or forgets
                self.pop(next(iter(self)), None)
        self[key] = plan
        return plan

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Plans, ()


class Engine(NamedTuple):
    """What a fused backend has: it makes plans, and packs and unpacks as :mod:`..bits` does."""

    plan: Callable[[Spec], Plan]
    pack: Callable[[Tensor, int], Tensor]
    unpack_into: Callable[[Tensor, Tensor], None]
    #: its own batch norm in training of such an input, or ``None``
    plan_norm: Callable[[Tensor], Any] = lambda x: None


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
