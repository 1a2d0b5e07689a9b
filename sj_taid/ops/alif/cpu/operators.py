"""Backend "numba": plans of calls, and bits of spikes, over the compiled loops."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ... import bits
from .. import autograd
from ..plan import ENGINES, Engine, Needs, Plan, Spec
from . import loops, threads
from .threads import Call, ask_for_huge_pages, partition

#: of input, spikes and their gradients; the loops compute on float32, and half precision is cast
DTYPES = (torch.float32, torch.bfloat16)
# Members of loops.Arguments, in the order of a plan's operands and results.
_OPERANDS = ("x", "v0", "q", "threshold", "mean", "rstd", "weight", "bias")
_OUTPUTS = ("spike", "v", "v_seq", "", "bits")  # there is no checkpoint
_GIVEN = ("grad_spike", "grad_v", "grad_v_seq", "")
_GRADS = ("grad_x", "grad_v0", "grad_w", "grad_threshold", "grad_weight", "grad_bias")


class CpuPlan(Plan):
    """The plan of a float32 spec on the CPU."""

    def __init__(self, spec: Spec) -> None:
        neuron = spec.dynamics
        # A byte holds two neighbours: of an odd number of them the spikes of two steps.
        straddles = neuron.levels > 1 and spec.steps > 1 and spec.neurons % 2 == 1
        super().__init__(spec, torch.float32, 0, not straddles, pack)
        self.is_large = 4 * spec.steps * spec.neurons >= 2 * threads.HUGE
        self.options = {
            "per_channel": spec.per_channel,
            "norm": spec.norm,
            "charge": neuron.charge,
            "soft": neuron.v_reset is None,
            "counts": neuron.counts,
            "levels": neuron.levels,
            "v_rest": neuron.v_reset or 0.0,
            "q_value": _sigmoid(neuron.w),
            "threshold_value": neuron.v_threshold or 0.0,
            "a": neuron.a,
            "b": neuron.b,
            "count": spec.steps * spec.neurons / max(spec.channels, 1),
        }
        self.forwards = self._call(loops.forward, (*_OPERANDS, *_OUTPUTS))
        self.backwards: dict[Needs, Call] = {}

    def _call(
        self, kernel: Any, names: Any, *passes: Any, whole: bool = False, row: int = 0
    ) -> Call:
        spec = self.spec
        sizes = partition(spec.steps, spec.neurons, spec.inner, spec.channels, whole)
        return Call(kernel, names, *passes, row=row, **sizes, **self.options)

    def start_forward(self, v_init: float, operands: Any, outputs: Any) -> None:
        x, v0, w, *others = operands
        if self.is_large:
            ask_for_huge_pages(outputs[0], outputs[2])
        self.forwards(v_init, x, v0, w if w is None else w.sigmoid(), *others, *outputs)

    def start_backward(
        self, needs: Needs, v_init: float, operands: Any, given: Any, grads: Any
    ) -> None:
        call = self.backwards.get(needs) or self._backward(needs)
        x, v0, w, *others = operands
        if self.is_large:
            ask_for_huge_pages(grads[0])
        call(v_init, x, v0, w if w is None else w.sigmoid(), *others, *given, *grads)

    def _backward(self, needs: Needs) -> Call:
        """The call for these gradients: in two passes where those of x need a norm's sums first."""
        spec, neuron = self.spec, self.spec.dynamics
        options = int(neuron.charge), neuron.v_reset is None, neuron.detach_reset
        learns = needs.w, needs.v_threshold
        function = loops.row_for(neuron.surrogate, *options, *learns, spec.norm)
        row = loops.compile_function(function, loops.ROW_SIGNATURE).address
        needs_sums = spec.norm and not spec.fixed_norm and needs.x
        passes: tuple[dict[str, float], ...] = ({"norm_sums": needs.norm},)
        whole = needs_sums and self._has_channels_in_cache()
        if whole:
            passes = ({"norm_sums": True, "ab": True},)
        elif needs_sums:
            passes = {"norm_sums": True, "sums_only": True}, {"ab": True}
        names = (*_OPERANDS, *_GIVEN, *_GRADS)
        call = self._call(loops.backward, names, *passes, whole=whole, row=row)
        return self.backwards.setdefault(needs, call)

    def _has_channels_in_cache(self) -> bool:
        """Whether all values of the channels of a part, at least one, fit the cache."""
        channels = threads.group_size(self.spec.channels, self.spec.inner)
        return 0 < self.options["count"] * channels <= threads.WHOLE


class _HalfPlan(CpuPlan):
    """The same of half precision, which is converted before and after."""

    def forward(self, v_init: float, *operands: Any) -> tuple[Any, ...]:
        x, *others = operands
        spike, *rest = super().forward(v_init, x.float(), *others)
        return spike.to(self.spec.dtype), *rest

    def backward(self, needs: Needs, v_init: float, given: Any, operands: Any) -> tuple[Any, ...]:
        (grad_spike, *others), (x, *rest) = given, operands
        grad_spike = grad_spike if grad_spike is None else grad_spike.float()
        operands = x.float(), *rest
        grad_x, *grads = super().backward(needs, v_init, (grad_spike, *others), operands)
        return grad_x if grad_x is None else grad_x.to(self.spec.dtype), *grads


def _make_plan(spec: Spec) -> CpuPlan:
    return CpuPlan(spec) if spec.dtype == torch.float32 else _HalfPlan(spec)


def _sigmoid(w: float | None) -> float:
    """As torch computes it in float32."""
    return 0.0 if w is None else float(torch.tensor(w, dtype=torch.float32, device="cpu").sigmoid())


@lru_cache(maxsize=256)
def _bits(unpacks: bool, counts: bool, steps: int, neurons: int) -> Call:
    options: dict[str, int] = {"unpacks": unpacks, "levels": bits.LARGEST_COUNT if counts else 1}
    sizes = partition(steps, neurons, 1, 1)
    return Call(loops.move_bits, ("spike", "bits"), **options, **sizes)


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
