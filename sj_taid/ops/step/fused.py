"""ALIF as a function of tensors, by a fused backend."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import copysign
from typing import Any

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn

from ..._internal import graph
from ..bits import is_dense
from . import compiled, reference
from .autograd import apply_fused
from .plan import ENGINES, Engine, Plan, Plans, arranged, find_plan, spec_of
from .program import NotRead, Reading
from .readings import read_neuron


class _ALIF(base.MemoryModule):
    """An ALIF whose parameters a call gives."""

    w: Tensor | None = None
    surrogate_function: Any

    def __init__(self, parameters: Sequence[Tensor], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.register_memory("v", 0.0)
        self._given = tuple(parameters)
        for name, value in options.items():
            setattr(self, name, value)

    def _taid_tensors(self) -> tuple[Tensor, ...]:
        return self._given


def read_alif(
    shape: Sequence[int],
    parameters: Sequence[Tensor],
    options: Mapping[str, Any],
    engine: Engine,
    device: Any,
) -> Reading | str:
    """The reading of an ALIF of w, if it has one, and a threshold, for steps of this shape."""
    node = _ALIF(parameters, options)
    return read_neuron(node, tuple(shape), reference.run_step, engine, device)


def _key_in_graph(x_seq: Tensor, parameters: Sequence[Tensor], options: dict[str, Any]) -> str:
    """The name of the reading in a graph that is being traced; none if there is no reading."""
    function, attributes = options["surrogate_function"], []
    for name in getattr(function, "__dict__", ()):
        value = getattr(function, name)
        if isinstance(value, bool | int | float | str | tuple):
            attributes.append((name, graph.as_constant(value)))
    numbers = options["decay_input"], graph.as_constant(options["v_reset"]), options["detach_reset"]
    shapes = tuple(tuple(p.shape) for p in parameters)
    about = tuple(attributes), numbers, shapes, x_seq.dim() - 1, x_seq.device.type
    return _find_key(type(function), *about)


@graph.constant_in_graphs
def _find_key(kind: Any, attributes: Any, numbers: Any, shapes: Any, axes: int, device: str) -> str:
    function = kind.__new__(kind)
    nn.Module.__init__(function)
    for name, value in attributes:
        vars(function)[name] = value
    options = dict(zip(("decay_input", "v_reset", "detach_reset"), numbers, strict=True))
    options["surrogate_function"] = function
    parameters = [torch.ones(shape) for shape in shapes]
    channels = max((p.numel() for p in parameters), default=1)
    shape = (2, channels, *[3] * (axes - 2))[:axes]
    reading = read_alif(shape, parameters, options, ENGINES[device], device)
    return "" if isinstance(reading, str) else compiled.key_of(reading)


def multi_step(
    engine: Engine,
    x_seq: Tensor,
    v: Tensor | float,
    w: Tensor | None,
    v_threshold: Tensor,
    *,
    store_v_seq: bool,
    **options: Any,
) -> tuple[Any, ...]:
    """:func:`sj_taid.ops.step.reference.multi_step` by a fused engine.

    A dense ``x_seq`` with time outermost is taken in its own layout (contiguous, channels-last);
    any other is made contiguous once. In a graph of ``torch.compile`` the neuron is one operator;
    what traces or transforms takes the definition, and so does a surrogate that cannot be read.
    """
    compiles = torch.compiler.is_compiling()
    is_plain = graph.is_eager() and type(x_seq) in (Tensor, nn.Parameter)
    if not (compiles or is_plain):
        return reference.multi_step(x_seq, v, w, v_threshold, store_v_seq=store_v_seq, **options)
    (x_seq, v0, *parameters), starts = operands_of(x_seq, v, w, v_threshold)
    if compiles:
        key = _key_in_graph(x_seq, parameters, options)
        if not key:
            options["store_v_seq"] = store_v_seq
            return reference.multi_step(x_seq, v, w, v_threshold, **options)
        return compiled.run(x_seq, [v0], starts, parameters, key, store_v_seq)
    saves = False
    if torch.is_grad_enabled():
        for tensor in (x_seq, v0, *parameters):
            if tensor is not None and tensor.requires_grad:
                saves = True
    plan = _find_plan(engine, x_seq, parameters, options, store_v_seq, saves)
    return apply_fused(plan, starts, "", x_seq, v0, *parameters, None, None, None, None)[:3]


#: the plans of calls by all that they depend on
PLANS = Plans()


def _find_plan(
    engine: Engine, x_seq: Tensor, parameters: Any, options: Any, store_v_seq: bool, saves: bool
) -> Plan:
    """The plan of a call, decided once for equal ones of a surrogate that is known."""
    numbers = _numbers_of(**options)
    shapes = x_seq.shape, x_seq.stride(), *[p.shape for p in parameters]
    key = engine, shapes, x_seq.dtype, x_seq.device, store_v_seq, saves, numbers
    plan = None if numbers is None else PLANS.get(key)
    if plan is None:
        reading = read_alif(x_seq.shape[1:], parameters, options, engine, x_seq.device)
        if isinstance(reading, str):
            raise NotRead(reading)
        spec = spec_of(x_seq, reading, store_v_seq=store_v_seq, saves=saves)
        plan = find_plan(engine, spec)
        if numbers is not None:
            PLANS.store(key, plan)
    return plan


def _numbers_of(surrogate_function: Any, **options: Any) -> tuple[Any, ...] | None:
    """What a step reads of its options; ``None`` of a surrogate but SpikingJelly's and ours."""
    kind: Any = type(surrogate_function)
    if kind.__module__.partition(".")[0] not in ("spikingjelly", __name__.partition(".")[0]):
        return None
    found: list[Any] = [kind]
    for name, value in (*options.items(), *vars(surrogate_function).items()):
        for part in value if type(value) is tuple else (value,):
            if type(part) in _NUMBERS and not (part == 0 and copysign(1.0, part) < 0):
                found += name, type(part), part
            elif part or type(part) not in _EMPTY:  # a hook, a parameter, a function of its own
                return None
    return tuple(found)


_NUMBERS, _EMPTY = (bool, int, float, str, type(None)), (dict, OrderedDict, set)


def operands_of(
    x_seq: Tensor, v: Tensor | float, w: Tensor | None, v_threshold: Tensor
) -> tuple[tuple[Any, ...], Any]:
    """A plan's operands, but for a norm's, and its ``v_init``."""
    dtype = reference.state_dtype(x_seq.dtype)
    x_seq = x_seq if is_dense(x_seq) else x_seq.contiguous()
    v0 = arranged(v if isinstance(v, Tensor) else None, x_seq.stride()[1:])
    parameters = [p.to(dtype).contiguous() for p in (w, v_threshold) if p is not None]
    return (x_seq, v0, *parameters), (0.0 if v0 is not None else v,)
