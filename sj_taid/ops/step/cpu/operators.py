"""Backend "numba": plans of calls, and bits of spikes, over the compiled loops."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ... import bits
from .. import autograd, fused
from ..plan import ENGINES, Engine, Plan, Spec
from ..program import Program
from ..text import Layout
from . import loops, rows, threads
from .norm import plan_norm
from .threads import Call, ask_for_huge_pages, partition

#: of input, spikes and their gradients; the loops compute on float32, and half precision is cast
DTYPES = (torch.float32, torch.bfloat16)
#: the places of a norm's tensors
_NORM = loops.MEAN, loops.RSTD, loops.WEIGHT, loops.BIAS
_NOWHERE = -1


class CpuPlan(Plan):
    """The plan of a float32 spec on the CPU."""

    def __init__(self, spec: Spec) -> None:
        neuron, program = spec.reading, spec.reading.program
        # A byte holds two neighbours: of an odd number of them the spikes of two steps.
        straddles = neuron.levels > 1 and spec.steps > 1 and spec.neurons % 2 == 1
        packs = not straddles if neuron.levels > 1 else neuron.least == 0
        super().__init__(spec, torch.float32, 0, packs, pack)
        self.layout = Layout(program.states, neuron.operands, len(program.totals))
        self.constants = torch.tensor(neuron.constants, dtype=torch.float32, device="cpu")
        self.options = {
            **self.layout.fields(),
            "norm": spec.norm,
            "forward_row": self._row(program, None),
            "least": float(neuron.least or 0),
            "levels": neuron.levels,
            "count": spec.steps * spec.neurons / max(spec.channels, 1),
        }
        states = range(program.states)
        self.places = (
            loops.X,
            *(loops.V0 + k for k in states),
            *(loops.OPERANDS + k for k in range(neuron.operands)),
            *_NORM,
        )
        if 4 * spec.steps * spec.neurons >= 2 * threads.HUGE:
            self.new_spikes = partial(_with_huge_pages, self.new_spikes)
            self.new_like = partial(_with_huge_pages, torch.empty_like)
        # There is no checkpoint.
        outputs = loops.SPIKE, *(loops.V + k for k in states), loops.V_SEQ, _NOWHERE, loops.BITS
        self.forwards = self._call(loops.forward, (*self.places, *outputs))

    def _row(self, program: Program, totals: tuple[int, ...] | None) -> int:
        return rows.address_of(program, self.layout.key, self.spec.norm, totals)

    def _call(
        self, kernel: Any, places: Any, *passes: Any, whole: bool = False, **options: Any
    ) -> Call:
        spec, neuron = self.spec, self.spec.reading
        shape = spec.steps, spec.neurons, spec.inner, spec.channels
        options |= partition(self.layout, *shape, whole) | self.options
        about = neuron.operand_channels, neuron.total_channels, self.constants
        return Call(kernel, places, about, *passes, **options)

    def start_forward(self, v_init: Any, operands: Any, outputs: Any) -> None:
        self.forwards(v_init, *operands, *outputs)

    def prepare(self, needs: Any, wanted: tuple[int, ...], used: Any) -> Call:
        """The call: in two passes where the gradients of x need a norm's sums first."""
        spec = self.spec
        needs_sums = spec.norm and not spec.fixed_norm and needs[0]
        passes: tuple[dict[str, float], ...] = ({"norm_sums": needs[-1]},)
        whole = needs_sums and self._has_channels_in_cache()
        if whole:
            passes = ({"norm_sums": True, "ab": True},)
        elif needs_sums:
            passes = {"norm_sums": True, "sums_only": True}, {"ab": True}
        upstream = loops.GRAD_SPIKE, *(loops.GRAD_V + k for k in self.states)
        grads = loops.GRAD_X, *(loops.GRAD_V0 + k for k in self.states)
        of_norm = loops.GRAD_WEIGHT, loops.GRAD_BIAS
        sums = [loops.TOTALS + k for k in range(self.layout.totals)]
        places = *self.places, *upstream, loops.GRAD_V_SEQ, _NOWHERE, *grads, *of_norm, *sums
        program = spec.reading.program
        found = [self._row(program.only(now), wanted) for now in used]
        found += found[-1:] * (loops.LAST_ROWS - len(found))
        options: Any = {"whole": whole, "backward_rows": tuple(found)}
        return self._call(loops.backward, places, *passes, **options)

    def _has_channels_in_cache(self) -> bool:
        """Whether all values of the channels of a part, at least one, fit the cache."""
        channels = threads.group_size(self.spec.channels, self.spec.inner)
        return 0 < self.options["count"] * channels <= threads.WHOLE


def _with_huge_pages(allocate: Any, *arguments: Any) -> Tensor:
    made = allocate(*arguments)
    ask_for_huge_pages(made)
    return made


class _HalfPlan(CpuPlan):
    """The plan of a spec of half precision, cast to float32 and back."""

    def forward(self, v_init: Any, *operands: Any) -> tuple[Any, ...]:
        x, *others = operands
        spike, *rest = super().forward(v_init, x.float(), *others)
        return spike.to(self.spec.dtype), *rest

    def backward(self, needs: Any, v_init: Any, upstream: Any, operands: Any) -> tuple[Any, ...]:
        (grad_spike, *others), (x, *rest) = upstream, operands
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
    _bits(False, packed.dim() == 1, *size)((), values.float(), packed)
    return packed


def unpack_into(packed: Tensor, values: Tensor) -> None:
    """:func:`sj_taid.ops.bits.unpack_into`."""
    is_float = values.dtype == torch.float32
    floats = values if is_float else torch.empty_like(values, dtype=torch.float32)
    size = bits.size_of_packed(packed, values)
    _bits(True, packed.dim() == 1, *size)((), floats, packed)
    if not is_float:
        values.copy_(floats)


ENGINES["cpu"] = ENGINE = Engine(_make_plan, pack, unpack_into, plan_norm)
unsupported = partial(autograd.unsupported, "cpu", DTYPES)
#: :func:`sj_taid.ops.step.reference.multi_step`, fused
multi_step = partial(fused.multi_step, ENGINE)
