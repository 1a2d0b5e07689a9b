"""Neurons on the fused operator, and the mark of modules that ``accelerate`` changed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional
from ._internal import compat, graph
from .kept.kept import Kept, Memory, keep, leave
from .kept.norms import find_source, reader_of
from .kept.saving import Counts, run_saving
from .ops import backends
from .ops import surrogate as derivatives
from .ops.alif.autograd import apply_fused
from .ops.alif.plan import Charge, Dynamics, Plan, Plans, Spec, arranged, find_plan, spec_of
from .ops.alif.reference import state_dtype
from .ops.bits import is_dense

#: ``w`` of a neuron without leak (IF): its sigmoid is 0, in float64 too. Not -inf, which would make
#: averaged weights NaN.
NO_LEAK_W = -1024.0
#: the kinds of tensors that a plan takes
_TAKES = (Tensor, nn.Parameter, Kept)
_NUMBERS = (bool, int, float, type(None), str)


class _Call(NamedTuple):
    """A neuron's call, decided in advance."""

    plan: Plan | None  #: ``None`` where no fused backend takes the call
    spec: Spec
    adapts: bool  #: whether a tensor needs another dtype or layout first
    strides: tuple[int, ...]  #: those of the plain neuron's spikes


class FusedNeuron:
    """A neuron whose sequences run by plans of the fused operator: :mod:`.ops.alif.plan`.

    A subclass says what it computes: its numbers, and the tensors that learn. One that is
    accelerated takes the input of the norm before it, and its spikes are saved as bits.
    """

    v: Any
    v_seq: Any
    v_reset: Any
    store_v_seq: Any
    extra_repr: Any
    #: not _backend, which SpikingJelly 0.0.0.0.14 sets
    _fused_backend: Any = backends.AUTO
    _taid_name = ""  # its path in the net, which errors say
    #: gives the plain attributes of a node that a call depends on, apart from its surrogate
    _taid_numbers: Any
    #: dtype -> how it charges, ``w`` and the threshold; ``None`` for what is a tensor
    _taid_constants: Any
    #: -> ``w`` and the threshold, or ``None`` for what is a number
    _taid_operands: Any
    #: input -> the voltage that a sequence starts from
    _taid_start: Any

    def _taid_strides(self, shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
        """The strides of the plain neuron's spikes for an input of these."""
        x_seq = torch.empty_strided(shape, strides, device="meta")
        return strides if is_dense(x_seq) else torch.empty(shape, device="meta").stride()

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """A sequence ``[T, N, *]`` from the state ``v``, which is updated."""
        store_v_seq = self.store_v_seq
        v = self._taid_start(x_seq)
        spike_seq, self.v, v_seq = self._taid_run(x_seq, v, store_v_seq)
        if store_v_seq:
            self.v_seq = v_seq
        return spike_seq

    def _taid_run(
        self, x_seq: Tensor, v: Tensor | float, store_v_seq: bool
    ) -> tuple[Tensor, Any, Any]:
        """Spikes, last voltage and every voltage of a sequence that starts at ``v``."""
        if not (type(x_seq) in _TAKES and graph.is_eager()):
            return _run_reference(self, x_seq, v, store_v_seq)
        with graph.plain_functions():
            w, v_threshold = self._taid_operands()
            keeps = isinstance(self, Accelerated) and torch.is_grad_enabled()
            keeps &= not torch.is_inference_mode_enabled()
            x, source = x_seq, None
            weight = bias = mean = rstd = None
            if keeps and type(x_seq) is Kept and x_seq._place is not None:
                source = find_source(x_seq, self)
            if source is not None:
                x, weight, bias, mean, rstd = source.tensors()
            v0 = v if isinstance(v, Tensor) else None
            tensors = x, v0, w, v_threshold, weight, bias
            call = _find_call(self, x_seq, v, tensors, (store_v_seq, keeps), source)
            plan, spec, adapts, strides = call
            if plan is None:
                return _run_reference(self, x_seq, v, store_v_seq)
            if source is not None:
                source.readers[reader_of(self)] = True
            if adapts:
                tensors = *_adapt(spec, *tensors[:4]), weight, bias
            v_init: Any = 0.0 if v0 is not None else v
            if spec.saves:
                kept = (x,) if type(x) is Kept else ()
                operands = *tensors[:4], mean, rstd, weight, bias
                arguments = plan, v_init, self._taid_name, *operands
                spike_seq, v, v_seq, bits = run_saving(kept, apply_fused, arguments, {})
            else:
                spike_seq, v, v_seq, _, bits = plan.forward(v_init, *tensors[:4], *[None] * 4)
            if keeps:
                spike_seq = _keep(self, spike_seq, bits, strides)
            return spike_seq, v, v_seq

    def _taid_label(self) -> str:
        name, kind = self._taid_name, type(self).__name__
        return f"the neuron {name!r}" if name else f"{kind}({self.extra_repr()})"

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle takes the voltages along, not the graph that made them.
        state: Any = super().__getstate__()
        return compat.detach_state(state)


def _find_call(
    node: Any, x_seq: Tensor, v: Any, tensors: Any, flags: tuple[bool, bool], source: Any
) -> _Call:
    """The plan of a call, by all that it depends on."""
    saves = False
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                saves = True
    x, v0, w, v_threshold, *_ = tensors
    numbers = node._taid_numbers(node)
    for number in numbers:
        if type(number) not in _NUMBERS:
            numbers = _values(numbers, v_threshold)
            break
    if source is None:
        place: Any = x.shape, x.dtype, x.device, x.is_inference()
    else:
        place = x_seq._place, source.fixed  # type: ignore[attr-defined]
    key = (
        *(place, x_seq.stride(), saves, flags, numbers),
        derivatives.key_of(node.surrogate_function),
        v0 if v0 is None else _form(v0),
        w if w is None else _form(w),
        v_threshold if v_threshold is None else _form(v_threshold),
    )
    plans = Plans.of(node)
    call = plans.get(key)
    if call is None:
        call = plans.keep(key, _decide(node, x_seq, v, w, v_threshold, (*flags, saves), source))
    return call


def _decide(
    node: Any, x_seq: Tensor, v: Any, w: Any, v_threshold: Any, flags: Any, source: Any
) -> _Call:
    """Check a call, and choose its backend and plan."""
    functional.check_call(x_seq, v, w, v_threshold, node._taid_label)
    function = node.surrogate_function
    engine = backends.resolve(node._fused_backend, x_seq, function).engine
    if engine is None:
        return _Call(None, None, False, ())  # type: ignore[arg-type]
    dtype = state_dtype(x_seq.dtype)
    charge, number, threshold = node._taid_constants(dtype)
    functional.check_counts(function, node.v_reset, charge is not Charge.NO_STATE)
    v_reset = None if node.v_reset is None else float(node.v_reset)
    dynamics = Dynamics(
        *(charge, number, threshold, v_reset, bool(node.detach_reset)),
        *derivatives.derivative_of(function),
    )
    tensors = [t for t in (w, v_threshold) if t is not None]
    per_channel = any(t.dim() for t in tensors)
    if source is None:
        x = x_seq if is_dense(x_seq) else torch.empty(x_seq.shape, device="meta")
        spec = spec_of(x, dynamics, per_channel, False, False, *flags)
        spec = spec._replace(dtype=x_seq.dtype, device=x_seq.device)
        adapts = x is not x_seq or x_seq.is_inference()
    else:
        place = x_seq._place  # type: ignore[attr-defined]
        spec, adapts = place.spec(dynamics, per_channel, source.fixed, *flags), False
    adapts |= any(
        t.dtype != dtype or not t.is_contiguous() or (t.dim() > 0) != per_channel for t in tensors
    )
    if isinstance(v, Tensor):
        adapts |= v.dtype != dtype or v.stride() != spec.strides[1:] or v.is_inference()
    strides = x_seq.stride()
    if not x_seq.is_contiguous():
        strides = node._taid_strides(x_seq.shape, strides)
    return _Call(find_plan(engine, spec), spec, adapts, strides)


def _keep(node: Any, spike_seq: Tensor, bits: Any, strides: tuple[int, ...]) -> Tensor:
    """Attach their bits to spikes, in the memory order of the plain neuron's spikes."""
    # Bits of spikes have an axis of time, counts have not.
    peak = 1 if bits.dim() == 2 else derivatives.levels_of(node.surrogate_function)
    if spike_seq.stride() != strides:  # the bits have the other memory order
        fired, spike_seq = spike_seq, arranged(spike_seq, strides)
        bits = bits if spike_seq is fired else None
    return keep(spike_seq, Memory(spike_seq), Counts(spike_seq, peak, bits))


def _run_reference(node: Any, x_seq: Tensor, v: Any, store_v_seq: bool) -> tuple[Tensor, Any, Any]:
    """The same by the definition, for what compiles, transforms or traces, and by its backend."""
    x_seq = leave(x_seq) if isinstance(x_seq, Kept) else x_seq
    w, v_threshold = node._taid_operands()
    dtype = state_dtype(x_seq.dtype)
    charge, number, threshold = node._taid_constants(dtype)
    if w is None and charge is not Charge.NO_STATE:
        number = NO_LEAK_W if charge is Charge.NO_LEAK else number
        w = x_seq.new_full((), number, dtype=dtype)
    if v_threshold is None:
        v_threshold = x_seq.new_full((), threshold, dtype=dtype)
    spike_seq, v, v_seq = functional.alif_multi_step(
        x_seq,
        v,
        w,
        v_threshold,
        decay_input=charge is Charge.DECAY_INPUT,
        v_reset=node.v_reset,
        surrogate_function=node.surrogate_function,
        detach_reset=node.detach_reset,
        store_v_seq=store_v_seq,
        backend=node._fused_backend,
    )
    return spike_seq, v, v_seq


def _values(numbers: tuple[Any, ...], v_threshold: Tensor | None) -> tuple[Any, ...]:
    """Attributes as plain numbers; a threshold that is a tensor is read at each call."""
    return tuple(
        None if n is v_threshold else n if type(n) in _NUMBERS else float(n) for n in numbers
    )


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """The properties of a tensor that a plan depends on."""
    is_ready = tensor.stride(), tensor.is_inference()
    return tensor.shape, tensor.dtype, tensor.device, is_ready


def _adapt(spec: Spec, x: Tensor, v0: Any, w: Any, v_threshold: Any) -> tuple[Any, ...]:
    """Give a call's tensors the dtypes and layouts that its plan takes."""
    dtype = state_dtype(spec.dtype)
    x = functional.savable(x)
    x = x if is_dense(x) else x.contiguous()
    if v0 is not None:
        v0 = arranged(functional.savable(v0).to(dtype), spec.strides[1:])
    w, v_threshold = (t if t is None else t.to(dtype) for t in (w, v_threshold))
    if spec.per_channel:
        w, v_threshold = (t if t is None else t.expand(spec.channels) for t in (w, v_threshold))
    w, v_threshold = (t if t is None else t.contiguous() for t in (w, v_threshold))
    return x, v0, w, v_threshold


class Accelerated:
    """A module whose class :mod:`.nets.exchange` has exchanged for a subclass, of the same name."""

    #: the class that it had
    _taid_kind: type


def restore(net: nn.Module) -> None:
    """Give every accelerated module of ``net`` its class back, or raise before the first."""
    modules: Any = {p: m for p, m in net.named_modules() if isinstance(m, Accelerated)}
    if changed := [p or "net" for p, m in modules.items() if "_taid_kind" not in vars(type(m))]:
        raise ValueError(
            f"the class of {', '.join(changed)} was changed after accelerate, so its own cannot be "
            "given back: torch.nn.utils.parametrize.remove_parametrizations first, if that did it"
        )
    for module in modules.values():
        module.__class__ = module._taid_kind
        for name in [name for name in vars(module) if name.startswith("_taid_")]:
            del vars(module)[name]
