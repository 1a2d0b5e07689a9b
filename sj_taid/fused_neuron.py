"""Neurons on the fused operator, and the mark of modules that ``accelerate`` changed."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from math import copysign
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional
from ._internal import compat, graph
from .kept.kept import Kept, Memory, attach, leave
from .kept.norms import find_source, reader_of
from .kept.saving import PackedRecipe, Recipe, run_saving
from .ops import backends
from .ops.bits import is_dense
from .ops.step import compiled
from .ops.step.autograd import apply_fused
from .ops.step.plan import ENGINES, Plan, Plans, Spec, arranged, find_plan, spec_of
from .ops.step.program import Reading
from .ops.step.readings import (
    BY_IDENTITY,
    NAMES,
    forget,
    has,
    neuron_of,
    plain_value,
    read_neuron,
)
from .ops.step.record import HOOKS, Notes
from .ops.step.reference import state_dtype
from .ops.step.sequence import Layout

#: the kinds of tensors that a plan takes
_TAKES = (Tensor, nn.Parameter, Kept)
_NUMBERS = (bool, int, float, type(None), str, *BY_IDENTITY)


class View(NamedTuple):
    """What a call reads of a neuron."""

    names: tuple[str, ...]  #: the attributes that are a part of the key
    numbers: Callable[[Any], tuple[Any, ...]]  #: gives their values
    #: the modules within, which must have no hooks, and what gives their attributes
    modules: tuple[tuple[str, Any], ...]
    outside: tuple[tuple[Any, Any], ...]  #: what has the numbers that its code names, and getters
    tensor_names: tuple[str, ...]
    #: gives parameters, buffers and such, if there are any
    tensors: Callable[[Any], tuple[Any, ...]] | None
    per_channel: bool  #: whether one of these has several values

    @property
    def key(self) -> tuple[Any, ...]:
        within = tuple(name for name, _ in self.modules)
        return self.names, within, len(self.outside), self.tensor_names, self.per_channel


class _Call(NamedTuple):
    """A neuron's call, decided in advance."""

    #: ``None`` where no fused backend takes the call; then of the ``spec`` whether the step is why
    plan: Plan | None
    spec: Any
    converts: bool  #: whether a tensor needs another dtype or layout first
    strides: tuple[int, ...]  #: those of the plain neuron's spikes
    least: int | None  #: the least that a step gives, if its outputs are whole numbers
    most: int
    starts: tuple[float, ...] = ()  #: the states before the first step, of a loop over time


class FusedNeuron:
    """A neuron whose sequences run by plans of the fused operator: :mod:`.ops.step.plan`.

    A subclass says what is read: its step. One that is accelerated takes the input of the norm
    before it, and its spikes are saved as bits.
    """

    v: Any
    v_seq: Any
    store_v_seq: Any
    extra_repr: Any
    #: not _backend, which SpikingJelly 0.0.0.0.14 sets
    _fused_backend: Any = backends.AUTO
    _taid_name = ""  # its path in the net, which errors say
    #: runs one step of a copy: :class:`.ops.step.record.Neuron`
    _taid_step: Any

    def train(self, mode: bool = True) -> Any:
        """As of its class; and its step's code is read again, since it may be another now.

        At the next call; at once if it is in a graph of torch.compile, which cannot read it.
        """
        node: Any = super().train(mode)  # type: ignore[misc]
        if not torch.compiler.is_compiling():
            read_again(node)
        return node

    def _taid_strides(self, shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
        """The strides of the plain neuron's spikes for an input of these."""
        x_seq = torch.empty_strided(shape, strides, device="meta")
        return strides if is_dense(x_seq) else torch.empty(shape, device="meta").stride()

    def _taid_run(
        self, x_seq: Tensor, states: dict[str, Any], store_v_seq: bool
    ) -> tuple[Any, ...] | None:
        """Spikes, next states and every voltage of a sequence; ``None``: run the plain class."""
        if not (type(x_seq) in _TAKES and graph.is_eager()):
            return self._taid_definition(x_seq, states, store_v_seq)
        with graph.plain_functions():
            plans = Plans.of(self)
            view = plans.view or _look(self, plans)
            keeps = isinstance(self, Accelerated) and torch.is_grad_enabled()
            keeps &= not torch.is_inference_mode_enabled()
            x, source = x_seq, None
            of_norm: tuple[Any, ...] = None, None, None, None
            if keeps and type(x_seq) is Kept and x_seq._place is not None:
                source = find_source(x_seq, self, view.per_channel)
            if source is not None:
                x, weight, bias, mean, rstd = source.tensors()
                of_norm = mean, rstd, weight, bias
            tensors, starts = _tensors_of(self, view, x, states)
            call = _find_call(
                self, plans, view, x_seq, states, tensors, of_norm, (store_v_seq, keeps), source
            )
            if call is None:  # it reads other attributes now
                return self._taid_run(x_seq, states, store_v_seq)
            plan, spec, converts, strides, least, most, fixed = call
            if plan is None:
                return None if spec else self._taid_definition(x_seq, states, store_v_seq)
            if source is not None:
                source.readers[reader_of(self)] = True
            if converts:
                tensors = _convert(spec, tensors, len(states))
            v_init = fixed or tuple(starts)
            if spec.saves:
                kept = (x,) if type(x) is Kept else ()
                arguments = plan, v_init, self._taid_name, *tensors, *of_norm
                *outputs, bits = run_saving(kept, apply_fused, arguments, {})
            else:
                *outputs, _, bits = plan.forward(v_init, *tensors, *[None] * 4)
            if keeps and least is not None:
                outputs[0] = _attach(outputs[0], bits, strides, least, most)
            return tuple(outputs)

    def _taid_definition(
        self, x_seq: Tensor, states: dict[str, Any], store_v_seq: bool
    ) -> tuple[Any, ...] | None:
        """The same for what compiles, transforms or traces; ``None``: run the plain class."""
        if torch.compiler.is_compiling():
            return run_in_graph(self, x_seq, states, store_v_seq)
        return None

    def _taid_check(self, x_seq: Tensor, states: dict[str, Any]) -> None:
        """Raise an error unless a call's tensors fit each other."""
        for v in states.values():
            functional.check_call(x_seq, v, None, None, self._taid_label)

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


def _look(node: Any, plans: Plans) -> View:
    """What a call reads of a neuron."""
    notes = NAMES.setdefault(getattr(node, "_taid_kind", type(node)), Notes())
    names = tuple(filter(partial(has, node), notes.numbers))
    own = [n for n in names if "." not in n and not isinstance(getattr(node, n), Tensor)]
    kind = "_taid_kind" if isinstance(node, Accelerated) else "__class__"
    modules = []
    for module in notes.modules:
        start = f"{module}."
        inner = [n.removeprefix(start) for n in names if n.startswith(start)]
        modules.append((module, attrgetter("__class__", "__class__", *inner)))
    tensors = neuron_of(node, node._taid_step, notes.tensors).tensors
    per_channel = any(t.numel() != 1 for t in tensors.values())
    numbers = attrgetter(kind, "_fused_backend", *own)
    given = getattr(type(node), "_taid_tensors", None) or _getter(tuple(tensors))
    read = names, numbers, tuple(modules), tuple(notes.outside.values())
    plans.view = View(*read, tuple(tensors), given, per_channel)
    return plans.view


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]] | None:
    """Gives attributes, always as a tuple."""
    if len(names) != 1:
        return attrgetter(*names) if names else None
    return lambda node: (getattr(node, names[0]),)


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
        layouts: list[Any] = []  # a comprehension would be a frame
        for tensor in tensors[1:]:
            layouts.append(tensor if tensor is None else _layout_key(tensor))
    except AttributeError:  # a module within is another, a tensor a number, or a number is gone
        if _look(node, plans).key == view.key:
            raise
        return None
    if source is None:
        place: Any = x_seq.shape, x_seq.dtype, x_seq.device, x_seq.is_inference()
    else:
        place = x_seq._place, source.fixed  # type: ignore[attr-defined]
    known = place, x_seq.stride(), saves, flags, numbers, view.names, *states, *layouts
    call = plans.get(known)
    if call is None:
        is_gone = any(t is None for t in tensors[1 + len(states) :])
        if is_gone and _look(node, plans).key != view.key:
            return None
        call = _plan_call(node, x_seq, states, tensors, (*flags, saves), source)
        if _look(node, plans).key != view.key:
            return None
        plans.store(known, call)
    return call


def _numbers_of(node: Any, view: View) -> tuple[Any, ...]:
    """What a call depends on but tensors, and how many hooks and functions of its own it has."""
    numbers, hooked = view.numbers(node), 0
    for name, attributes in view.modules:
        module = node._modules.get(name)
        numbers += attributes(module)
        for hooks in HOOKS:
            hooked += len(getattr(module, hooks, None) or ())
    for home, get in view.outside:
        numbers += (get(home),)
    for number in numbers:  # no function of ours for each, which would cost a tenth of a call
        kind = type(number)
        is_known = kind in _NUMBERS and not (number == 0 and copysign(1.0, number) < 0)
        if kind is tuple:  # (1,) is (True,), too
            is_known = True
            for part in number:
                if type(part) is not str:
                    is_known = False
        if not is_known:
            return *map(plain_value, numbers), hooked
    return *numbers, *map(type, numbers), hooked


def _plan_call(
    node: Any, x_seq: Tensor, states: dict[str, Any], tensors: list[Any], flags: Any, source: Any
) -> _Call:
    """Check a call, and choose its backend and plan."""
    node._taid_check(x_seq, states)
    engine = backends.resolve(node._fused_backend, x_seq).engine
    nothing = _Call(None, None, False, (), None, 0)
    if engine is None:
        return nothing
    run = node._taid_step
    run = run._replace(length=len(x_seq)) if isinstance(run, Layout) else run
    neuron = _why_not_these(node, x_seq, states, tensors[1 + len(states) :]) or read_neuron(
        node, tuple(x_seq.shape[1:]), run, engine, x_seq.device
    )
    is_other = isinstance(neuron, Reading) and neuron.keeps != getattr(node, "_taid_keeps", ())
    if is_other or (isinstance(neuron, Reading) and neuron.states != len(states)):
        neuron = "its loop over time has other states than when it was accelerated"
    if isinstance(neuron, str):
        if backends.is_chosen(node._fused_backend):
            raise backends.BackendUnavailableError(f"no fused backend can take this call: {neuron}")
        _warn_once(node, neuron)
        return nothing._replace(spec=True)
    dtype, least, most = state_dtype(x_seq.dtype), neuron.least, neuron.most or 0
    parameters = [t for t in tensors[1 + len(states) :] if t is not None]
    store_v_seq, pack, saves = flags
    flags = store_v_seq, pack and least is not None, saves
    if source is None:
        x = x_seq if is_dense(x_seq) else torch.empty(x_seq.shape, device="meta")
        spec = spec_of(x, neuron, False, False, *flags)
        spec = spec._replace(dtype=x_seq.dtype, device=x_seq.device)
        converts = x is not x_seq or x_seq.is_inference()
    else:
        place = x_seq._place  # type: ignore[attr-defined]
        spec, converts = place.spec(neuron, source.fixed, *flags), False
    converts |= any(t.dtype != dtype or not t.is_contiguous() for t in parameters)
    for v in states.values():
        if isinstance(v, Tensor):
            converts |= v.dtype != dtype or v.stride() != spec.strides[1:] or v.is_inference()
    strides = x_seq.stride()
    if not x_seq.is_contiguous():
        strides = node._taid_strides(x_seq.shape, strides)
    plan = find_plan(engine, spec)
    return _Call(plan, spec, converts, strides, least, most, neuron.starts)


def _why_not_these(node: Any, x_seq: Tensor, states: Any, tensors: list[Any]) -> str | None:
    """Why a call cannot be a plan's: a sequence that is no longer its steps, or dtypes.

    Torch promotes tensors of several dtypes, and a plan computes in one.
    """
    dtypes = x_seq.dtype, state_dtype(x_seq.dtype)
    for name, v in states.items():
        if isinstance(v, Tensor) and v.dtype not in dtypes:
            return f"its state {name!r} is {v.dtype}, its input {x_seq.dtype}"
    if hasattr(node, "_taid_tensors"):  # ALIF, which computes in float32
        return None
    is_loop = isinstance(node._taid_step, Layout)
    if reason := None if is_loop else compat.why_not_stepwise(node._taid_kind):
        return reason
    for name, t in zip(Plans.of(node).view.tensor_names, tensors, strict=True):
        if t.dtype not in dtypes[: 1 + (t.dim() == 0)]:
            return f"its parameter or buffer {name!r} is {t.dtype}, its input {x_seq.dtype}"
    return None


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


def _attach(spike_seq: Tensor, bits: Any, strides: Any, least: int, most: int) -> Tensor:
    """Attach their bits to spikes, in the memory order of the plain neuron's spikes."""
    if spike_seq.stride() != strides:  # the bits have the other memory order
        fired, spike_seq = spike_seq, arranged(spike_seq, strides)
        bits = bits if spike_seq is fired else None
    recipe: Recipe | None = PackedRecipe(spike_seq, most - least, bits)
    if least:
        recipe = None if bits is None else Recipe(partial(_shift, recipe.make, least), (bits,))  # type: ignore[union-attr]
    return attach(spike_seq, Memory(spike_seq), recipe)


def _shift(make: Callable[..., Tensor], least: int, *saved: Tensor) -> Tensor:
    return make(*saved).add_(least)


class InGraphs(NamedTuple):
    """What torch.compile needs of a neuron, to make one operator of it."""

    keys: dict[int, str]  #: the number of axes of a step -> the name of its reading
    #: attributes, and their values then
    numbers: tuple[tuple[tuple[str, ...], Any], ...]
    modules: tuple[tuple[str, type], ...]  #: modules within, and their classes
    tensors: tuple[tuple[str, torch.Size], ...]  #: and their shapes
    channels: int  #: of the tensors of several values; 0 without
    shapes: tuple[tuple[int, ...], ...]  #: of inputs that its step was read for
    device: torch.device


def note_for_graphs(node: Any, readings: dict[int, Reading], shapes: Any, device: Any) -> None:
    """Note for torch.compile what a neuron's readings, by their numbers of axes, depend on.

    ``shapes``: of inputs ``[N, *]`` on ``device``, to read it for again.
    """
    view = _look(node, Plans())
    keys = {axes: compiled.key_of(reading) for axes, reading in readings.items()}
    numbers = tuple((tuple(n.split(".")), attrgetter(n)(node)) for n in view.names)
    modules = tuple((name, type(node._modules.get(name))) for name, _ in view.modules)
    tensors = tuple((name, getattr(node, name).shape) for name in view.tensor_names)
    channels = max((shape.numel() for _, shape in tensors if shape.numel() != 1), default=0)
    is_known = all(type(value) in (*_NUMBERS, tuple) for _, value in numbers)
    about: Any = numbers, modules, tensors, channels, tuple(shapes), device
    node.__dict__["_taid_in_graphs"] = InGraphs(keys if is_known else {}, *about)


class _Sweep:
    """A call of ``train()`` or ``eval()`` of a net, which calls that of each neuron in it."""

    def __init__(self, root: Any) -> None:
        self.root = weakref.ref(root)
        self.seen: Any = weakref.WeakSet()  #: the neurons that were called
        self.kinds: set[type] = set()  #: their classes, which are read once


_sweep = _Sweep(nn.Identity())


def read_again(node: Any) -> None:
    """Read the code of a neuron's step again, as it is now: at its next call, or in a graph now."""
    global _sweep
    frame, root = sys._getframe(2), node
    while frame.f_code is nn.Module.train.__code__:
        root, frame = frame.f_locals["self"], frame.f_back  # type: ignore[assignment]
    if _sweep.root() is not root or node in _sweep.seen:  # another, or the next of the same net
        _sweep = _Sweep(root)
    kind = getattr(node, "_taid_kind", type(node))
    if kind not in _sweep.kinds:
        forget(kind)
    _sweep.seen.add(node)
    _sweep.kinds.add(kind)
    node.__dict__.pop("_taid_plans", None)
    known = node.__dict__.get("_taid_in_graphs")
    if known is not None and kind in compiled.KINDS:
        # What transforms or watches this call would do so to a reading: until the next the class
        # runs.
        node.__dict__["_taid_in_graphs"] = known._replace(keys={})
    if known is not None and kind in compiled.KINDS and graph.is_eager():
        about = node._taid_step, ENGINES[known.device.type], known.device
        found = {len(shape): read_neuron(node, shape, *about) for shape in known.shapes}
        read = {axes: one for axes, one in found.items() if isinstance(one, Reading)}
        read = {} if compat.why_not_stepwise(kind) else read
        note_for_graphs(node, read, known.shapes, known.device)


def run_in_graph(
    node: Any, x_seq: Tensor, states: dict[str, Any], store_v_seq: bool
) -> tuple[Any, ...] | None:
    """A neuron as one operator, or ``None``: as torch.compile traces it, on what it reads."""
    known = node.__dict__.get("_taid_in_graphs")
    x_seq = leave(x_seq) if isinstance(x_seq, Kept) else x_seq
    if known is None or backends.resolve(node._fused_backend, x_seq).engine is None:
        return None
    key = known.keys.get(x_seq.dim() - 1, "")
    if not compiled.is_known(key, node._taid_kind) or not _is_as_noted(node, known):
        return None
    dtype = state_dtype(x_seq.dtype)
    dtypes = x_seq.dtype, dtype  # torch promotes tensors of several dtypes
    if known.channels and x_seq.shape[2:3] != (known.channels,):
        return None
    for name, shape in known.tensors:
        t = getattr(node, name)
        if t is None or t.shape != shape or t.dtype not in dtypes[: 1 + (t.dim() == 0)]:
            return None
    for v in states.values():
        if isinstance(v, Tensor) and (v.shape != x_seq.shape[1:] or v.dtype not in dtypes):
            return None
    x_seq = x_seq if is_dense(x_seq) else x_seq.contiguous()
    starts = [v.to(dtype) if isinstance(v, Tensor) else None for v in states.values()]
    v_init = [0.0 if isinstance(v, Tensor) else float(v) for v in states.values()]
    parameters = [getattr(node, name).to(dtype).contiguous() for name, _ in known.tensors]
    return compiled.run(x_seq, starts, v_init, parameters, key, store_v_seq)


def _is_as_noted(node: Any, known: InGraphs) -> bool:
    """Whether a neuron reads the numbers and functions that it read when it was accelerated."""
    for path, wanted in known.numbers:
        value = node
        for name in path:
            value = getattr(value, name)
        if value != wanted or type(value) is not type(wanted):
            return False
    for name, kind in known.modules:
        module = getattr(node, name)
        if type(module) is not kind:
            return False
        for hooks in HOOKS:
            if len(getattr(module, hooks)) > 0:
                return False
    return True


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
        found.append(t if t is None else t.to(dtype).contiguous())
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
