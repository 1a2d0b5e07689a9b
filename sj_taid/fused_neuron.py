"""Neurons on the fused operator, and the mark of modules that ``accelerate`` changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import functional
from ._internal import compat, graph
from .kept.kept import Kept, Memory, keep, leave
from .kept.norms import find_source, reader_of
from .kept.saving import Counts, Recipe, run_saving
from .ops import backends
from .ops import surrogate as derivatives
from .ops.alif.autograd import apply_fused
from .ops.alif.plan import Charge, Dynamics, Plan, Plans, Spec, arranged, find_plan, spec_of
from .ops.alif.reference import state_dtype
from .ops.bits import is_dense
from .ops.step.read import NotRead, Reading
from .ops.step.record import HOOKS, Neuron, Notes
from .ops.step.verify import verify

#: ``w`` of a neuron without leak (IF): its sigmoid is 0, in float64 too. Not -inf, which would make
#: averaged weights NaN.
NO_LEAK_W = -1024.0
#: the kinds of tensors that a plan takes
_TAKES = (Tensor, nn.Parameter, Kept)
#: whether the kernels of a GPU run a call
_is_on_gpu = attrgetter("is_cuda")
_NUMBERS = (bool, int, float, type(None), str, type, tuple)


class View(NamedTuple):
    """What a call reads of a neuron."""

    names: tuple[str, ...]  #: the attributes that are a part of the key
    numbers: Callable[[Any], tuple[Any, ...]]  #: gives their values
    #: the modules within, which must have no hooks, and what gives their attributes
    modules: tuple[tuple[str, Any], ...]
    tensor_names: tuple[str, ...]
    #: gives parameters, buffers and such, if there are any
    tensors: Callable[[Any], tuple[Any, ...]] | None

    @property
    def key(self) -> tuple[Any, ...]:
        return self.names, self.tensor_names


class _Call(NamedTuple):
    """A neuron's call, decided in advance."""

    #: ``None`` where no fused backend takes the call; then of the ``spec`` whether the step is why
    plan: Plan | None
    spec: Any
    converts: bool  #: whether a tensor needs another dtype or layout first
    strides: tuple[int, ...]  #: those of the plain neuron's spikes
    least: int | None  #: the least that a step gives, if its outputs are whole numbers
    most: int


class FusedNeuron:
    """A neuron whose sequences run by plans of the fused operator: :mod:`.ops.alif.plan`.

    A subclass says what is read: its step, and on a GPU how it charges. One that is accelerated
    takes the input of the norm before it, and its spikes are saved as bits.
    """

    v: Any
    v_seq: Any
    v_reset: Any
    store_v_seq: Any
    extra_repr: Any
    surrogate_function: Any
    #: not _backend, which SpikingJelly 0.0.0.0.14 sets
    _fused_backend: Any = backends.AUTO
    _taid_name = ""  # its path in the net, which errors say
    #: gives the plain attributes that a call on a GPU depends on, apart from its surrogate
    _taid_numbers: Any
    #: dtype -> how it charges, ``w`` and the threshold; ``None`` for what is a tensor
    _taid_constants: Any = None
    #: -> ``w`` and the threshold, or ``None`` for what is a number
    _taid_operands: Any
    #: runs one step of a copy: :class:`.ops.step.record.Neuron`
    _taid_step: Any

    def _taid_strides(self, shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
        """The strides of the plain neuron's spikes for an input of these."""
        x_seq = torch.empty_strided(shape, strides, device="meta")
        return strides if is_dense(x_seq) else torch.empty(shape, device="meta").stride()

    def _taid_run(
        self, x_seq: Tensor, states: dict[str, Any], store_v_seq: bool
    ) -> tuple[Any, ...] | None:
        """Spikes, next states and every voltage of a sequence; ``None``: run the plain class."""
        if not (type(x_seq) in _TAKES and graph.is_eager()):
            return run_definition(self, x_seq, states, store_v_seq)
        with graph.plain_functions():
            on_gpu = _is_on_gpu(x_seq)
            plans = Plans.of(self)
            view = plans.views.get(on_gpu) or _look(self, plans, x_seq)
            if view is None:
                return run_definition(self, x_seq, states, store_v_seq)
            keeps = isinstance(self, Accelerated) and torch.is_grad_enabled()
            keeps &= not torch.is_inference_mode_enabled()
            x, source = x_seq, None
            of_norm: tuple[Any, ...] = None, None, None, None
            if keeps and type(x_seq) is Kept and x_seq._place is not None:
                source = find_source(x_seq, self)
            if source is not None:
                x, weight, bias, mean, rstd = source.tensors()
                of_norm = mean, rstd, weight, bias
            tensors, starts = _tensors_of(self, view, x, states)
            call = _find_call(
                self, plans, view, x_seq, states, tensors, of_norm, (store_v_seq, keeps), source
            )
            if call is None:  # it reads other attributes now
                return self._taid_run(x_seq, states, store_v_seq)
            plan, spec, converts, strides, least, most = call
            if plan is None:
                return None if spec else run_definition(self, x_seq, states, store_v_seq)
            if source is not None:
                source.readers[reader_of(self)] = True
            if converts:
                tensors = _convert(spec, tensors, len(states))
            v_init: Any = starts[0] if on_gpu else tuple(starts)
            if spec.saves:
                kept = (x,) if type(x) is Kept else ()
                arguments = plan, v_init, self._taid_name, *tensors, *of_norm
                *outputs, bits = run_saving(kept, apply_fused, arguments, {})
            else:
                *outputs, _, bits = plan.forward(v_init, *tensors, *[None] * 4)
            if keeps and least is not None:
                outputs[0] = _keep(outputs[0], bits, strides, least, most)
            return tuple(outputs)

    def _taid_label(self) -> str:
        name, kind = self._taid_name, type(self).__name__
        return f"the neuron {name!r}" if name else f"{kind}({self.extra_repr()})"

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle takes the voltages along, not the graph that made them.
        state: Any = super().__getstate__()
        return compat.detach_state(state)


def _tensors_of(
    node: Any, view: View, x: Tensor, states: dict[str, Any]
) -> tuple[list[Any], list[float]]:
    """The input, the states and what else a call reads, and the states that are numbers."""
    tensors, starts = [x], []
    for v in states.values():
        is_tensor = isinstance(v, Tensor)
        tensors.append(v if is_tensor else None)  # type: ignore[arg-type]
        starts.append(0.0 if is_tensor else float(v))
    if view.tensors is not None:
        tensors += view.tensors(node)
    return tensors, starts


# ---- what a neuron reads -------------------------------------------------------------------------

#: class -> the names of attributes, modules and tensors that any of its neurons has read
_NAMES: dict[type, Notes] = {}
#: (class, names, their values, sizes) -> the reading, or why there is none
_READINGS: dict[Any, Reading | str] = {}


def _look(node: Any, plans: Plans, x_seq: Tensor) -> View | None:
    """What a call on the input's device reads of a neuron; ``None`` if it can be no plan's."""
    if _is_on_gpu(x_seq):
        if node._taid_constants is None:
            return None
        view = View((), node._taid_numbers, (), (), type(node)._taid_operands)
    else:
        notes = _NAMES.setdefault(getattr(node, "_taid_kind", type(node)), Notes())
        names = tuple(filter(partial(_has, node), notes.numbers))
        own = [n for n in names if "." not in n and not isinstance(getattr(node, n), Tensor)]
        modules = []
        for module in notes.modules:
            inner = [n.partition(".")[2] for n in names if n.startswith(f"{module}.")]
            modules.append((module, attrgetter("__class__", "__class__", *inner)))
        tensors = tuple(Neuron(node, node._taid_step, notes.tensors).tensors)
        numbers = attrgetter("__class__", "_fused_backend", *own)
        given = getattr(type(node), "_taid_tensors", None) or _getter(tensors)
        view = View(names, numbers, tuple(modules), tensors, given)
    plans.views[_is_on_gpu(x_seq)] = view
    return view


def _has(node: Any, name: str) -> bool:
    try:
        attrgetter(name)(node)
    except AttributeError:
        return False
    return True


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]] | None:
    """Gives attributes, always as a tuple."""
    if len(names) != 1:
        return attrgetter(*names) if names else None
    return lambda node: (getattr(node, names[0]),)


def read_neuron(node: Any, shape: tuple[int, ...], run: Any) -> Reading | str:
    """A neuron's step as it is read for inputs ``[N, *]`` of this shape, or why it is not.

    ``run``: of :class:`.ops.step.record.Neuron`.
    """
    kind = getattr(node, "_taid_kind", type(node))
    notes = _NAMES.setdefault(kind, Notes())

    def key() -> Any:
        names = tuple(filter(partial(_has, node), (*notes.numbers, *notes.modules)))
        tensors = Neuron(node, run, notes.tensors).tensors
        per_channel = any(t.numel() != 1 for t in tensors.values())
        sizes = len(shape), shape[1:2] if per_channel else ()
        shapes = tuple((name, tuple(t.shape)) for name, t in tensors.items())
        return kind, names, _values_of(node, names), sizes, shapes

    found = _READINGS.get(key())
    if found is None:
        found = _read_and_check(node, run, shape, notes)
        if len(_READINGS) > _MOST_READINGS:
            _READINGS.pop(next(iter(_READINGS)))
        _READINGS[key()] = found
    return found


def _read_and_check(node: Any, run: Any, shape: tuple[int, ...], notes: Notes) -> Reading | str:
    """A reading, after what it reads is noted; of other tensors of the node nothing is known."""
    try:
        neuron = Neuron(node, run)
        found, read = neuron.read(shape)
        notes.add(read)
        if any(name not in notes.tensors for name in neuron.tensors):
            neuron = Neuron(node, run, notes.tensors)
            found, _ = neuron.read(shape)
        if reason := verify(neuron, found, shape):
            kind = getattr(node, "_taid_kind", type(node))
            warnings.warn(f"{kind.__name__}: {reason}", RuntimeWarning, stacklevel=2)
            return reason
    except NotRead as error:
        return f"its step {error}"
    return found


_MOST_READINGS = 4096


def _values_of(node: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    """The values of attributes, and of modules their classes and whether they have hooks."""
    values = []
    for name in names:
        value = attrgetter(name)(node)
        if isinstance(value, nn.Module):
            hooked = any(getattr(value, hooks, None) for hooks in HOOKS)
            values.append((type(value), hooked))
        else:
            values.append(_plain_value(value))
    return tuple(values)


# ---- a call --------------------------------------------------------------------------------------


def _find_call(
    node: Any,
    plans: Plans,
    view: View,
    x_seq: Tensor,
    states: dict[str, Any],
    tensors: list[Any],
    of_norm: Any,
    flags: tuple[bool, bool],
    source: Any,
) -> _Call | None:
    """The plan of a call, by all that it depends on; ``None`` if the neuron reads more now."""
    saves = False
    try:
        if torch.is_grad_enabled():
            for tensor in (*tensors, *of_norm):
                if tensor is not None and tensor.requires_grad:
                    saves = True
        numbers = _numbers_of(node, view)
    except AttributeError:  # a module within is another, a tensor a number, or a number is gone
        if _look(node, plans, x_seq).key == view.key:  # type: ignore[union-attr]
            raise
        return None
    if source is None:
        place: Any = x_seq.shape, x_seq.dtype, x_seq.device, x_seq.is_inference()
    else:
        place = x_seq._place, source.fixed  # type: ignore[attr-defined]
    function = derivatives.key_of(node.surrogate_function) if _is_on_gpu(x_seq) else view.names
    key = [place, x_seq.stride(), saves, flags, numbers, function, *states]
    for tensor in tensors[1:]:
        key.append(tensor if tensor is None else _layout_key(tensor))
    known = tuple(key)
    call = plans.get(known)
    if call is None:
        call = _plan_call(node, x_seq, states, tensors, (*flags, saves), source)
        if _look(node, plans, x_seq).key != view.key:  # type: ignore[union-attr]
            return None
        plans.keep(known, call)
    return call


def _numbers_of(node: Any, view: View) -> tuple[Any, ...]:
    """The attributes that a call depends on, and whether a module within has hooks."""
    numbers, hooked = view.numbers(node), False
    for name, attributes in view.modules:
        module = node._modules.get(name)
        numbers += attributes(module)
        for hooks in HOOKS:
            if getattr(module, hooks, None):
                hooked = True
    for number in numbers:
        if type(number) not in _NUMBERS:
            numbers = tuple(map(_plain_value, numbers))
            break
    return *numbers, hooked


def _plan_call(
    node: Any, x_seq: Tensor, states: dict[str, Any], tensors: list[Any], flags: Any, source: Any
) -> _Call:
    """Check a call, and choose its backend and plan."""
    neuron: Any
    if node._taid_constants is not None:
        accelerates = isinstance(node, Accelerated) and not _is_on_gpu(x_seq)
        w, v_threshold = (None, None) if accelerates else node._taid_operands()
        functional.check_call(x_seq, states["v"], w, v_threshold, node._taid_label)
    on_gpu = _is_on_gpu(x_seq)
    function = node.surrogate_function if on_gpu else None
    engine = backends.resolve(node._fused_backend, x_seq, function).engine
    nothing = _Call(None, None, False, (), None, 0)
    if engine is None:
        return nothing
    dtype = state_dtype(x_seq.dtype)
    parameters = [t for t in tensors[1 + len(states) :] if t is not None]
    if on_gpu:
        neuron, least, most = _dynamics_of(node, dtype), 0, derivatives.levels_of(function)
        per_channel = any(t.dim() for t in parameters)
        if per_channel and isinstance(node, Accelerated) and not hasattr(node, "channels"):
            return nothing
    else:
        neuron = read_neuron(node, tuple(x_seq.shape[1:]), node._taid_step)
        if isinstance(neuron, str):
            if backends.is_chosen(node._fused_backend):
                raise backends.BackendUnavailableError(
                    f"backend 'numba' cannot take this call: {neuron}"
                )
            _warn_once(node, neuron)
            return nothing._replace(spec=True)
        least, most = neuron.least, neuron.most or 0
        per_channel = any((*neuron.operand_channels, *neuron.total_channels))
    store_v_seq, pack, saves = flags
    flags = store_v_seq, pack and least is not None, saves
    if source is None:
        x = x_seq if is_dense(x_seq) else torch.empty(x_seq.shape, device="meta")
        spec = spec_of(x, neuron, per_channel, False, False, *flags)
        spec = spec._replace(dtype=x_seq.dtype, device=x_seq.device)
        converts = x is not x_seq or x_seq.is_inference()
    else:
        place = x_seq._place  # type: ignore[attr-defined]
        spec, converts = place.spec(neuron, per_channel, source.fixed, *flags), False
    converts |= any(
        t.dtype != dtype or not t.is_contiguous() or (on_gpu and (t.dim() > 0) != per_channel)
        for t in parameters
    )
    for v in states.values():
        if isinstance(v, Tensor):
            converts |= v.dtype != dtype or v.stride() != spec.strides[1:] or v.is_inference()
    strides = x_seq.stride()
    if not x_seq.is_contiguous():
        strides = node._taid_strides(x_seq.shape, strides)
    return _Call(find_plan(engine, spec), spec, converts, strides, least, most)


def _dynamics_of(node: Any, dtype: torch.dtype) -> Dynamics:
    """What a neuron computes, of those that the kernels of a GPU know."""
    function = node.surrogate_function
    charge, w, threshold = node._taid_constants(dtype)
    functional.check_counts(function, node.v_reset, charge is not Charge.NO_STATE)
    v_reset = None if node.v_reset is None else float(node.v_reset)
    derivative = derivatives.derivative_of(function)
    about: Any = charge, w, threshold, v_reset, bool(node.detach_reset), *derivative
    return Dynamics(*about)


_warned: set[tuple[type, str]] = set()


def _warn_once(node: Any, reason: str) -> None:
    """Say that a neuron runs as its plain class does, if a call is the first to know."""
    if (type(node), reason) not in _warned:
        _warned.add((type(node), reason))
        warnings.warn(
            f"{node._taid_label()} is not fused, and runs as its class does: {reason}",
            RuntimeWarning,
            stacklevel=6,
        )


def _keep(spike_seq: Tensor, bits: Any, strides: Any, least: int, most: int) -> Tensor:
    """Attach their bits to spikes, in the memory order of the plain neuron's spikes."""
    if spike_seq.stride() != strides:  # the bits have the other memory order
        fired, spike_seq = spike_seq, arranged(spike_seq, strides)
        bits = bits if spike_seq is fired else None
    recipe: Recipe | None = Counts(spike_seq, most - least, bits)
    if least:
        recipe = None if bits is None else Recipe(partial(_shift, recipe.make, least), (bits,))  # type: ignore[union-attr]
    return keep(spike_seq, Memory(spike_seq), recipe)


def _shift(make: Callable[..., Tensor], least: int, *saved: Tensor) -> Tensor:
    return make(*saved).add_(least)


def run_definition(
    node: Any, x_seq: Tensor, states: dict[str, Any], store_v_seq: bool, backend: str | None = None
) -> tuple[Any, ...] | None:
    """The same by the definition, for what compiles, transforms or traces, and by its backend."""
    if node._taid_constants is None:
        return None
    x_seq = leave(x_seq) if isinstance(x_seq, Kept) else x_seq
    w, v_threshold = node._taid_operands()
    dtype = state_dtype(x_seq.dtype)
    charge, number, threshold = node._taid_constants(dtype)
    if w is None and charge is not Charge.NO_STATE:
        number = NO_LEAK_W if charge is Charge.NO_LEAK else number
        w = x_seq.new_full((), number, dtype=dtype)
    if v_threshold is None:
        v_threshold = x_seq.new_full((), threshold, dtype=dtype)
    return functional.alif_multi_step(
        x_seq,
        states["v"],
        w,
        v_threshold,
        decay_input=charge is Charge.DECAY_INPUT,
        v_reset=node.v_reset,
        surrogate_function=node.surrogate_function,
        detach_reset=node.detach_reset,
        store_v_seq=store_v_seq,
        backend=backend or node._fused_backend,
    )


def _plain_value(value: Any) -> Any:
    """An attribute as a plain number; of a tensor, which is read at each call, its class."""
    if isinstance(value, Tensor):
        return type(value)
    if isinstance(value, np.ndarray):
        value = value.item()
    return value if isinstance(value, type | tuple) else (type(value), value)


def _layout_key(tensor: Tensor) -> tuple[Any, ...]:
    """The properties of a tensor that a plan depends on."""
    is_ready = tensor.stride(), tensor.is_inference()
    return tensor.shape, tensor.dtype, tensor.device, is_ready


def _convert(spec: Spec, tensors: list[Any], states: int) -> list[Any]:
    """Give a call's tensors the dtypes and layouts that its plan takes."""
    dtype = state_dtype(spec.dtype)
    x = functional.savable(tensors[0])
    found: list[Any] = [x if is_dense(x) else x.contiguous()]
    for v in tensors[1 : 1 + states]:
        v = v if v is None else arranged(functional.savable(v).to(dtype), spec.strides[1:])
        found.append(v)
    for t in tensors[1 + states :]:
        t = t if t is None else t.to(dtype)
        if t is not None and spec.per_channel and isinstance(spec.dynamics, Dynamics):
            t = t.expand(spec.channels)
        found.append(t if t is None else t.contiguous())
    return found


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
