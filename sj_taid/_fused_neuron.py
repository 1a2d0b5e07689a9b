"""Neurons on the fused operator, and the mark of modules that ``accelerate`` changed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _compat, _graph, functional
from .ops import backends
from .ops import surrogate as derivatives
from .ops.alif.autograd import apply_fused, arranged, spec_of
from .ops.alif.plan import Dynamics, Plan, Plans, Spec, find_plan
from .ops.alif.reference import state_dtype
from .ops.bits import is_dense

#: ``w`` of a neuron without leak (IF): its sigmoid is 0, in float64 too. Not -inf, which would make
#: averaged weights NaN.
NO_LEAK_W = -1024.0


class NormInput(NamedTuple):
    """What a neuron reads in place of a norm's output: the norm's input, parameters and numbers."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    numbers: Tensor
    #: what of them a plan depends on; it makes the spec of a call
    place: Any
    #: which of x, weight and bias required a gradient at the norm's call
    needs: tuple[bool, ...]


class _Call(NamedTuple):
    """A neuron's call, decided in advance."""

    plan: Plan | None  #: ``None`` where no fused backend takes the call
    spec: Spec
    adapts: bool  #: whether a tensor needs another dtype or layout first


class FusedNeuron:
    """A neuron whose sequences run by plans of the fused operator: :mod:`.ops.alif.plan`.

    A subclass says what it computes: its numbers, and the tensors that learn.
    """

    v: Any
    v_seq: Any
    v_reset: Any
    store_v_seq: Any
    surrogate_function: Any
    detach_reset: Any
    extra_repr: Any
    #: not _backend, which SpikingJelly 0.0.0.0.14 sets
    _fused_backend: Any = backends.AUTO
    _taid_name = ""  # its path in the net, which errors say
    #: the kinds of tensors that a plan takes
    _taid_takes: Any = (Tensor, nn.Parameter)
    #: gives the plain attributes of a node that a call depends on, apart from its surrogate
    _taid_numbers: Any

    def _taid_constants(self, dtype: torch.dtype) -> tuple[Any, bool, Any]:
        """``w`` of a dtype, ``decay_input`` and the threshold; ``None`` for what is a tensor.

        A ``w`` of -inf is no leak, one of inf no state.
        """
        raise NotImplementedError

    def _taid_operands(self) -> tuple[Tensor | None, Tensor | None]:
        """``w`` and the threshold, or ``None`` for what is a number."""
        raise NotImplementedError

    def _taid_start(self, x_seq: Tensor) -> Tensor | float:
        """The voltage that a sequence starts from."""
        raise NotImplementedError

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """A sequence ``[T, N, *]`` from the state ``v``, which is updated."""
        store_v_seq = self.store_v_seq
        v = self._taid_start(x_seq)
        spike_seq, self.v, v_seq, _ = self._taid_run(x_seq, v, store_v_seq)
        if store_v_seq:
            self.v_seq = v_seq
        return spike_seq

    def _taid_run(
        self,
        x_seq: Tensor,
        v: Tensor | float,
        store_v_seq: bool,
        pack: bool = False,
        norm: NormInput | None = None,
    ) -> tuple[Any, ...]:
        """Spikes, last voltage, every voltage, and bits to ``pack``.

        With ``norm`` the input is the output of that norm, which is computed too.
        """
        w, v_threshold = self._taid_operands()
        if norm is not None:
            x, weight, bias, numbers, place, _ = norm
        elif type(x_seq) in self._taid_takes and _graph.is_eager():
            x, weight, bias, numbers = x_seq, None, None, None
            place = x.shape, x.stride(), x.dtype, x.device, x.is_inference()
        else:
            return self._taid_run_operators(x_seq, v, w, v_threshold, store_v_seq)
        v0 = v if isinstance(v, Tensor) else None
        saves = False
        if torch.is_grad_enabled():
            for tensor in (x, v0, w, v_threshold, weight, bias):
                if tensor is not None and tensor.requires_grad:
                    saves = True
        node_numbers = self._taid_numbers(self)
        for number in node_numbers:
            if isinstance(number, Tensor):
                node_numbers = _values(node_numbers, v_threshold)
                break
        key = (
            *(place, saves, store_v_seq, pack, node_numbers),
            derivatives.key_of(self.surrogate_function),
            v0 if v0 is None else _form(v0),
            w if w is None else _form(w),
            v_threshold if v_threshold is None else _form(v_threshold),
        )
        plans = Plans.of(self)
        call = plans.get(key)
        if call is None:
            call = self._taid_decide(x_seq, v, w, v_threshold, (store_v_seq, pack, saves), place)
            plans.keep(key, call)
        plan, spec, adapts = call
        if plan is None:
            return self._taid_run_operators(x_seq, v, w, v_threshold, store_v_seq)
        if adapts:
            x, v0, w, v_threshold = _adapt(spec, x, v0, w, v_threshold)
        v_init: Any = 0.0 if v0 is not None else v
        if saves:
            leaves = x, v0, w, v_threshold, weight, bias
            return apply_fused(*leaves, plan, spec, v_init, numbers, self._taid_name)
        spike_seq, v, v_seq, _, bits = plan.forward(x, v0, v_init, w, v_threshold, numbers)
        return spike_seq, v, v_seq, bits

    def _taid_decide(
        self, x_seq: Tensor, v: Any, w: Any, v_threshold: Any, flags: Any, place: Any
    ) -> _Call:
        """Check a call, and choose its backend and plan."""
        functional.check_call(x_seq, v, w, v_threshold)
        function = self.surrogate_function
        engine = backends.resolve(self._fused_backend, x_seq, function).engine
        if engine is None:
            return _Call(None, None, False)  # type: ignore[arg-type]
        dtype = state_dtype(x_seq.dtype)
        number, decay_input, threshold = self._taid_constants(dtype)
        functional.check_counts(function, self.v_reset, number != math.inf)
        v_reset = None if self.v_reset is None else float(self.v_reset)
        dynamics = Dynamics(
            *(number, decay_input, threshold, v_reset, self.detach_reset),
            *(*derivatives.derivative_of(function), derivatives.levels_of(function)),
        )
        tensors = [t for t in (w, v_threshold) if t is not None]
        per_channel = any(t.dim() for t in tensors)
        if isinstance(place, tuple):
            x = x_seq if is_dense(x_seq) else torch.empty(x_seq.shape, device="meta")
            spec = spec_of(x, dynamics, per_channel, False, False, *flags)
            spec = spec._replace(dtype=x_seq.dtype, device=x_seq.device)
            adapts = x is not x_seq or x_seq.is_inference()
        else:
            spec, adapts = place.spec(dynamics, per_channel, *flags), False
        adapts |= any(
            t.dtype != dtype or not t.is_contiguous() or (t.dim() > 0) != per_channel
            for t in tensors
        )
        if isinstance(v, Tensor):
            adapts |= v.dtype != dtype or v.stride() != spec.strides[1:] or v.is_inference()
        return _Call(find_plan(engine, spec), spec, adapts)

    def _taid_run_operators(
        self, x_seq: Tensor, v: Any, w: Any, v_threshold: Any, store_v_seq: bool
    ) -> tuple[Any, ...]:
        """The same by any backend, for what compiles, transforms or traces."""
        dtype = state_dtype(x_seq.dtype)
        number, decay_input, threshold = self._taid_constants(dtype)
        if w is None and number != math.inf:
            w = x_seq.new_full((), max(number, NO_LEAK_W), dtype=dtype)
        if v_threshold is None:
            v_threshold = x_seq.new_full((), threshold, dtype=dtype)
        return *functional.alif_multi_step(
            x_seq,
            v,
            w,
            v_threshold,
            decay_input=decay_input,
            v_reset=self.v_reset,
            surrogate_function=self.surrogate_function,
            detach_reset=self.detach_reset,
            store_v_seq=store_v_seq,
            backend=self._fused_backend,
        ), None

    def _taid_label(self) -> str:
        name, kind = self._taid_name, type(self).__name__
        return f"the neuron {name!r}" if name else f"{kind}({self.extra_repr()})"

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle takes the voltages along, not the graph that made them.
        state: Any = super().__getstate__()
        return _compat.detach_state(state)


def _values(numbers: tuple[Any, ...], v_threshold: Tensor | None) -> tuple[Any, ...]:
    """The values of attributes, of which some are tensors; the threshold is read at each call."""
    return tuple(
        None if number is v_threshold else number.item() if isinstance(number, Tensor) else number
        for number in numbers
    )


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """What of a tensor a plan depends on."""
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
    """A module whose class :mod:`.acceleration` has exchanged for a subclass, of the same name."""

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
