"""Backend "numba": plans of calls, and bits of spikes, over the compiled loops."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ... import bits
from .. import autograd
from ..plan import Engine, Needs, Norm, Spec
from . import loops, threads
from .threads import Call, Partition, ask_for_huge_pages

#: of input, spikes and their gradients; the loops compute on float32, and half precision is cast
DTYPES = (torch.float32, torch.bfloat16)


class CpuPlan:
    """The :class:`..plan.Plan` of a float32 spec on the CPU."""

    has_checkpoint = False

    def __init__(self, spec: Spec) -> None:
        self.spec, neuron = spec, spec.dynamics
        float32: dict[str, Any] = {"dtype": torch.float32, "device": spec.device}
        self.new = partial(torch.empty, **float32)
        self.new_v = partial(torch.empty_strided, spec.shape[1:], spec.strides[1:], **float32)
        self.new_seq = partial(torch.empty_strided, spec.shape, spec.strides, **float32)
        self.parameter = (spec.channels,) if spec.per_channel else ()
        self.bits = bits.packed_shape(neuron.levels, spec.steps, spec.neurons)
        # A byte holds two neighbours: of an odd number of them the spikes of two steps.
        straddles = neuron.levels > 1 and spec.steps > 1 and spec.neurons % 2 == 1
        #: whether forward packs, or a pass after it
        self.packs, self.packs_after = spec.pack and not straddles, spec.pack and straddles
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
        self.forwards = Call(loops.forward, self._partition(whole=False), **self.options)
        self.backwards: dict[Needs, Call] = {}

    def _partition(self, whole: bool) -> Partition:
        spec = self.spec
        return Partition.of_neurons(spec.steps, spec.neurons, spec.inner, spec.channels, whole)

    def forward(
        self,
        x: Tensor,
        v0: Tensor | None,
        v_init: float,
        w: Tensor | None,
        v_threshold: Tensor | None,
        norm: Norm | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        spike, v = self.new_seq(), self.new_v()
        v_seq = self.new_seq() if self.spec.store_v_seq else None
        packed = self.new(self.bits, dtype=torch.uint8) if self.packs else None
        ask_for_huge_pages(spike, v_seq)
        self.forwards(
            v_init,
            norm,
            x=x,
            v0=v0,
            q=None if w is None else w.sigmoid(),
            threshold=v_threshold,
            spike=spike,
            v=v,
            v_seq=v_seq,
            bits=packed,
        )
        if self.packs_after:
            packed = bits.pack_whole(spike, self.spec.dynamics.levels, pack, pack_counts)
        return spike, v, v_seq, None, packed

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
        norm: Norm | None,
    ) -> tuple[Tensor | None, ...]:
        call = self.backwards.get(needs) or self._backward(needs)
        channels = self.spec.channels
        grads = {
            "grad_x": torch.empty_like(x) if needs.x else None,
            "grad_v0": self.new_v() if needs.v0 else None,
            "grad_w": self.new(self.parameter) if needs.w else None,
            "grad_threshold": self.new(self.parameter) if needs.v_threshold else None,
            "grad_weight": self.new(channels) if needs.norm else None,
            "grad_bias": self.new(channels) if needs.norm else None,
        }
        ask_for_huge_pages(grads["grad_x"])
        call(
            v_init,
            norm,
            x=x,
            v0=v0,
            q=None if w is None else w.sigmoid(),
            threshold=v_threshold,
            **grads,
            grad_spike=grad_spike,
            grad_v=grad_v,
            grad_v_seq=grad_v_seq,
        )
        return tuple(grads.values())

    def _backward(self, needs: Needs) -> Call:
        """The call for these gradients: in two passes where those of x need a norm's sums first."""
        spec, neuron = self.spec, self.spec.dynamics
        function = loops.row_for(
            neuron.surrogate,
            int(neuron.charge),
            neuron.v_reset is None,
            neuron.detach_reset,
            needs.w,
            needs.v_threshold,
            spec.norm,
        )
        row = loops.compile_function(function, loops.ROW_SIGNATURE).address
        needs_sums = spec.norm and not spec.fixed_norm and needs.x
        passes: tuple[dict[str, float], ...] = ({"norm_sums": needs.norm},)
        whole = needs_sums and self._has_channels_in_cache()
        if whole:
            passes = ({"norm_sums": True, "ab": True},)
        elif needs_sums:
            passes = {"norm_sums": True, "sums_only": True}, {"ab": True}
        call = Call(loops.backward, self._partition(whole), *passes, row=row, **self.options)
        return self.backwards.setdefault(needs, call)

    def _has_channels_in_cache(self) -> bool:
        """Whether all values of the channels of a part, at least one, fit the cache."""
        spec = self.spec
        channels = threads.group_size(spec.channels, spec.inner)
        return 0 < self.options["count"] * channels <= threads.WHOLE


class _HalfPlan(CpuPlan):
    """The same of half precision, which is converted before and after."""

    def forward(self, x: Tensor, *operands: Any) -> Any:
        spike, *rest = super().forward(x.float(), *operands)
        return spike.to(self.spec.dtype), *rest

    def backward(
        self, needs: Needs, grad_spike: Any, grad_v: Any, grad_v_seq: Any, x: Any, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        grads = None if grad_spike is None else grad_spike.float(), grad_v, grad_v_seq
        grad_x, *others = super().backward(needs, *grads, x.float(), *rest)
        return None if grad_x is None else grad_x.to(self.spec.dtype), *others


def _make_plan(spec: Spec) -> CpuPlan:
    return CpuPlan(spec) if spec.dtype == torch.float32 else _HalfPlan(spec)


def _sigmoid(w: float | None) -> float:
    """As torch computes it in float32."""
    return 0.0 if w is None else float(torch.tensor(w, dtype=torch.float32, device="cpu").sigmoid())


@lru_cache(maxsize=256)
def _bits(kernel: Any, steps: int, neurons: int) -> Call:
    return Call(kernel, Partition.of_neurons(steps, neurons, 1, 1))


def pack(spikes: Tensor) -> Tensor:
    """:func:`sj_taid.ops.bits.pack`."""
    shape = bits.packed_shape(1, *spikes.shape)
    packed = torch.empty(shape, dtype=torch.uint8, device="cpu")
    _bits(loops.pack, *spikes.shape)(spike=spikes.float(), bits=packed)
    return packed


def unpack_into(packed: Tensor, spikes: Tensor) -> None:
    """:func:`sj_taid.ops.bits.unpack_into`."""
    _unpack(loops.unpack, packed, spikes, *spikes.shape)


def pack_counts(counts: Tensor) -> Tensor:
    """:func:`sj_taid.ops.bits.pack_counts`."""
    shape = bits.packed_shape(bits.LARGEST_COUNT, 1, len(counts))
    packed = torch.empty(shape, dtype=torch.uint8, device="cpu")
    _bits(loops.pack_counts, 1, len(counts))(spike=counts.float(), bits=packed)
    return packed


def unpack_counts_into(packed: Tensor, counts: Tensor) -> None:
    """:func:`sj_taid.ops.bits.unpack_counts_into`."""
    _unpack(loops.unpack_counts, packed, counts, 1, len(counts))


def _unpack(kernel: Any, packed: Tensor, values: Tensor, steps: int, neurons: int) -> None:
    is_float = values.dtype == torch.float32
    floats = values if is_float else torch.empty_like(values, dtype=torch.float32)
    _bits(kernel, steps, neurons)(spike=floats, bits=packed)
    if not is_float:
        values.copy_(floats)


ENGINE = Engine(
    plan=_make_plan,
    pack=pack,
    unpack_into=unpack_into,
    pack_counts=pack_counts,
    unpack_counts_into=unpack_counts_into,
)

unsupported = partial(autograd.unsupported, "cpu", DTYPES)
#: :func:`sj_taid.ops.alif.reference.multi_step`, fused
multi_step = partial(autograd.multi_step, ENGINE)
