"""Backend "numba": plans of calls, and bits of spikes, over the compiled loops."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ... import bits, surrogate
from ...step.read import Reading, read
from ...step.text import Layout
from .. import autograd, reference
from ..plan import ENGINES, Charge, Dynamics, Engine, Plan, Spec
from . import loops, rows, threads
from .threads import Call, ask_for_huge_pages, partition

#: of input, spikes and their gradients; the loops compute on float32, and half precision is cast
DTYPES = (torch.float32, torch.bfloat16)
#: the places of a norm's tensors
_NORM = loops.MEAN, loops.RSTD, loops.WEIGHT, loops.BIAS
_NOWHERE = -1


@lru_cache(maxsize=256)
def read_alif(dynamics: Dynamics, axes: int, channels: int | None) -> Reading:
    """ALIF's own step, of ``w`` and a threshold for each of these ``channels``, or for all."""
    function = surrogate.made_again(dynamics.surrogate, dynamics.parameters)
    options: Any = {"v_reset": dynamics.v_reset, "detach_reset": dynamics.detach_reset}
    options |= {"decay_input": dynamics.charge is Charge.DECAY_INPUT}

    def step(x: Tensor, states: Any, parameters: Any) -> Any:
        w, v_threshold = (reference.per_channel(p, x) for p in parameters)
        q = None if dynamics.charge is Charge.NO_STATE else w.sigmoid()
        spike, v = reference.step(
            x, states[0], q, v_threshold, surrogate_function=function, **options
        )
        return spike, (v,)

    parameter = torch.empty(() if channels is None else (channels,))
    channels = 1 if channels is None else channels
    return read(step, 1, (parameter, parameter), (1, channels, *[1] * (axes - 2))[:axes])


class CpuPlan(Plan):
    """The plan of a float32 spec on the CPU."""

    def __init__(self, spec: Spec) -> None:
        if isinstance(spec.dynamics, Dynamics):
            channels = spec.channels if spec.per_channel else None
            reading = read_alif(spec.dynamics, len(spec.shape) - 1, channels)
            spec = spec._replace(dynamics=reading)
        neuron, program = spec.dynamics, spec.dynamics.program
        # A byte holds two neighbours: of an odd number of them the spikes of two steps.
        straddles = neuron.levels > 1 and spec.steps > 1 and spec.neurons % 2 == 1
        super().__init__(spec, torch.float32, 0, not straddles, pack)
        self.is_large = 4 * spec.steps * spec.neurons >= 2 * threads.HUGE
        self.layout = Layout(program.states, neuron.operands, len(program.totals))
        self.first = 1 + program.states  #: where parameters are among the operands
        self.last = self.first + neuron.parameters
        self.constants = torch.tensor(neuron.constants, dtype=torch.float32, device="cpu")
        self.before = neuron.formulas.before()
        self.options = {
            **self.layout.fields(),
            "norm": spec.norm,
            "forward_row": self._row(None),
            "least": float(neuron.least or 0),
            "levels": neuron.levels,
            "count": spec.steps * spec.neurons / max(spec.channels, 1),
        }
        states = range(program.states)
        self.given = (
            loops.X,
            *(loops.V0 + k for k in states),
            *(loops.OPERANDS + k for k in range(neuron.operands)),
            *_NORM,
        )
        # There is no checkpoint.
        outputs = loops.SPIKE, *(loops.V + k for k in states), loops.V_SEQ, _NOWHERE, loops.BITS
        self.forwards = self._call(loops.forward, (*self.given, *outputs))
        self.backwards: dict[Any, Any] = {}

    def _row(self, totals: tuple[int, ...] | None) -> int:
        spec = self.spec
        return rows.address_of(spec.dynamics.program, self.layout.key, spec.norm, totals)

    def _call(
        self, kernel: Any, places: Any, *passes: Any, whole: bool = False, **options: Any
    ) -> Call:
        spec, neuron = self.spec, self.spec.dynamics
        shape = spec.steps, spec.neurons, spec.inner, spec.channels
        options |= partition(self.layout, *shape, whole) | self.options
        about = neuron.operand_channels, neuron.total_channels, self.constants
        return Call(kernel, places, about, *passes, **options)

    def start_forward(self, v_init: Any, operands: Any, outputs: Any) -> None:
        if self.is_large:
            ask_for_huge_pages(outputs[0])
        if self.first < self.last:
            operands = self._operands(operands)
        self.forwards(v_init, *operands, *outputs)

    def _operands(self, tensors: Any) -> Any:
        """The tensors of a call with the operands in the place of parameters."""
        first, last = self.first, self.last
        return *tensors[:first], *self.before(*tensors[first:last]), *tensors[last:]

    def backward(
        self, needs: Any, v_init: Any, given: tuple[Any, ...], operands: tuple[Any, ...]
    ) -> tuple[Tensor | None, ...]:
        first, last = self.first, self.last
        call, shapes, after = self.backwards.get(needs) or self._backward(needs)
        grad_x = torch.empty_like(operands[0]) if needs[0] else None
        if self.is_large:
            ask_for_huge_pages(grad_x)
        grad_v0: list[Any] = []
        for need in needs[1:first]:
            grad_v0.append(self.new_v() if need else None)
        weight = self.new(self.spec.channels) if needs[-1] else None
        bias = self.new(self.spec.channels) if needs[-1] else None
        totals: list[Any] = []
        for shape in shapes:
            totals.append(shape if shape is None else self.new(shape))
        grads = grad_x, *grad_v0, weight, bias, *totals
        parameters = operands[first:last]
        if first < last:
            operands = self._operands(operands)
        call(v_init, *operands, *given, *grads)
        learned: list[Any] = [None] * (last - first)
        if after is not None:
            learned = after(*parameters, *operands[first : first + self.layout.operands], *totals)
        return grad_x, *grad_v0, *learned, weight, bias

    def _backward(self, needs: Any) -> tuple[Call, list[Any], Any]:
        """The call for these gradients: in two passes where those of x need a norm's sums first.

        And the shapes of the sums for parameters, ``None`` for one that is not needed, and what
        makes gradients of them.
        """
        spec, neuron, first, last = self.spec, self.spec.dynamics, self.first, self.last
        learns = needs[first:last]
        wanted = neuron.formulas.totals_of(learns)
        needs_sums = spec.norm and not spec.fixed_norm and needs[0]
        passes: tuple[dict[str, float], ...] = ({"norm_sums": needs[-1]},)
        whole = needs_sums and self._has_channels_in_cache()
        if whole:
            passes = ({"norm_sums": True, "ab": True},)
        elif needs_sums:
            passes = {"norm_sums": True, "sums_only": True}, {"ab": True}
        states = range(neuron.program.states)
        given = loops.GRAD_SPIKE, *(loops.GRAD_V + k for k in states), loops.GRAD_V_SEQ, _NOWHERE
        v0 = (loops.GRAD_V0 + k for k in states)
        grads = loops.GRAD_X, *v0, loops.GRAD_WEIGHT, loops.GRAD_BIAS
        sums = [loops.TOTALS + k for k in range(self.layout.totals)]
        places = *self.given, *given, *grads, *sums
        row = self._row(wanted)
        call = self._call(loops.backward, places, *passes, whole=whole, backward_row=row)
        shapes = [
            shape if k in wanted else None for k, shape in enumerate(neuron.formulas.total_shapes)
        ]
        after = neuron.formulas.after(learns) if any(learns) else None
        return self.backwards.setdefault(needs, (call, shapes, after))

    def _has_channels_in_cache(self) -> bool:
        """Whether all values of the channels of a part, at least one, fit the cache."""
        channels = threads.group_size(self.spec.channels, self.spec.inner)
        return 0 < self.options["count"] * channels <= threads.WHOLE


class _HalfPlan(CpuPlan):
    """The same of half precision, which is converted before and after."""

    def forward(self, v_init: Any, *operands: Any) -> tuple[Any, ...]:
        x, *others = operands
        spike, *rest = super().forward(v_init, x.float(), *others)
        return spike.to(self.spec.dtype), *rest

    def backward(self, needs: Any, v_init: Any, given: Any, operands: Any) -> tuple[Any, ...]:
        (grad_spike, *others), (x, *rest) = given, operands
        grad_spike = grad_spike if grad_spike is None else grad_spike.float()
        operands = x.float(), *rest
        grad_x, *grads = super().backward(needs, v_init, (grad_spike, *others), operands)
        return grad_x if grad_x is None else grad_x.to(self.spec.dtype), *grads


def _make_plan(spec: Spec) -> CpuPlan:
    return CpuPlan(spec) if spec.dtype == torch.float32 else _HalfPlan(spec)


@lru_cache(maxsize=256)
def _bits(unpacks: bool, counts: bool, steps: int, neurons: int) -> Call:
    layout = Layout(0, 0, 0)
    options: Any = {"unpacks": unpacks, "levels": bits.LARGEST_COUNT if counts else 1}
    options |= partition(layout, steps, neurons, 1, 1) | layout.fields()
    return Call(loops.move_bits, (loops.SPIKE, loops.BITS), **options)


def pack(values: Tensor, most: int = 1) -> Tensor:
    """:func:`sj_taid.ops.bits.pack`."""
    size = bits.size_of(values, most)
    packed = torch.empty(bits.packed_shape(most, *size), dtype=torch.uint8, device="cpu")
    _bits(False, packed.dim() == 1, *size)(0.0, values.float(), packed)
    return packed


def unpack_into(packed: Tensor, values: Tensor) -> None:
    """:func:`sj_taid.ops.bits.unpack_into`."""
    is_float = values.dtype == torch.float32
    floats = values if is_float else torch.empty_like(values, dtype=torch.float32)
    size = bits.size_of_packed(packed, values)
    _bits(True, packed.dim() == 1, *size)(0.0, floats, packed)
    if not is_float:
        values.copy_(floats)


ENGINES["cpu"] = ENGINE = Engine(_make_plan, pack, unpack_into)
unsupported = partial(autograd.unsupported, "cpu", DTYPES)
#: :func:`sj_taid.ops.alif.reference.multi_step`, fused
multi_step = partial(autograd.multi_step, ENGINE)
