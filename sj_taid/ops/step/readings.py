"""The readings of neurons by what their steps read: made once, checked, and kept."""

from __future__ import annotations

import warnings
from functools import partial
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.jit import ScriptFunction

from ..._internal import compat
from .code import is_plain, is_plain_array
from .program import NotRead, Reading
from .record import HOOKS, Neuron, Notes
from .sequence import Layout, Loop
from .trace import ONE_READING
from .verify import verify

#: class -> the names of attributes, modules and tensors that any of its neurons has read
NAMES: dict[type, Notes] = {}
#: (class, how it runs, names, their values, sizes, engine) -> the reading, or why there is none
_READINGS: dict[Any, Reading | str] = {}
#: what is equal to itself alone
BY_IDENTITY = (type, FunctionType, BuiltinFunctionType, MethodType, property, ScriptFunction)


def read_neuron(
    node: Any, shape: tuple[int, ...], run: Any, engine: Any, device: Any
) -> Reading | str:
    """A neuron's step as it is read for inputs ``[N, *]`` of this shape, or why it is not.

    ``run``: of :class:`.record.Neuron`; ``engine``: of the backend, which is checked on ``device``.
    """
    kind = getattr(node, "_taid_kind", type(node))
    notes = NAMES.setdefault(kind, Notes())

    def key() -> Any:
        names = tuple(filter(partial(has, node), (*notes.numbers, *notes.modules)))
        outside = tuple(plain_value(get(home)) for home, get in notes.outside.values())
        neuron = neuron_of(node, run, notes.tensors)
        tensors, states = neuron.tensors, tuple(neuron.states)
        per_channel = any(t.numel() != 1 for t in tensors.values())
        sizes = len(shape), shape[1:2] if per_channel else ()
        shapes = tuple((name, tuple(t.shape)) for name, t in tensors.items())
        values = names, values_of(node, names), own_functions(node), outside
        return kind, run, values, sizes, shapes, states, engine

    with ONE_READING:
        found = _READINGS.get(key())
        if found is None:
            found = _read_and_check(node, run, shape, notes, engine, device)
            if len(_READINGS) > _MOST_READINGS:
                _READINGS.pop(next(iter(_READINGS)))
            _READINGS[key()] = found
        return found


def neuron_of(node: Any, run: Any, only: Any = None) -> Neuron:
    """How a module is read: by its step, or by its loop over time."""
    return (Loop if isinstance(run, Layout) else Neuron)(node, run, only)


def _read_and_check(
    node: Any, run: Any, shape: tuple[int, ...], notes: Notes, engine: Any, device: Any
) -> Reading | str:
    """A reading, after what it reads is noted; of other tensors of the node nothing is known."""
    if torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a neuron's first call is checked, which a CUDA graph being captured cannot do: "
            "run one training step before capturing"
        )
    try:
        neuron = neuron_of(node, run)
        found = neuron.read(shape, notes)
        if any(name not in notes.tensors for name in neuron.tensors):
            neuron = neuron_of(node, run, notes.tensors)
            found = neuron.read(shape, notes)
        check = neuron.verify if isinstance(neuron, Loop) else partial(verify, neuron)
        if reason := check(found, shape, engine, device):
            kind = getattr(node, "_taid_kind", type(node))
            warnings.warn(f"{kind.__name__}: {reason}", RuntimeWarning, stacklevel=2)
            return reason
    except NotRead as error:
        return f"its {'loop over time' if isinstance(run, Layout) else 'step'} {error}"
    return found


_MOST_READINGS = 4096


def values_of(node: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    """The values of attributes, and of modules their classes and whether they have hooks."""
    values = []
    for name in names:
        value = attrgetter(name)(node)
        if isinstance(value, nn.Module):
            hooked = any(getattr(value, hooks, None) for hooks in HOOKS)
            values.append((type(value), hooked, own_functions(value)))
        else:
            values.append(plain_value(value))
    return tuple(values)


def has(node: Any, name: str) -> bool:
    try:
        attrgetter(name)(node)
    except AttributeError:
        return False
    return True


def own_functions(module: Any) -> tuple[Any, ...]:
    """What a module has alone in the place of its class's methods."""
    kind = getattr(module, "_taid_kind", type(module))
    own = [(n, v) for n, v in vars(module).items() if callable(v) and hasattr(kind, n)]
    return tuple((n, plain_value(v)) for n, v in own)


def forget(kind: type) -> None:
    """Read the steps of a class again at the next call: their code may be another."""
    NAMES.pop(kind, None)
    for key in [key for key in _READINGS if key[0] is kind]:
        _READINGS.pop(key, None)
    for function in (compat.step_of, compat.starts_at_numbers):
        function.cache_clear()


def plain_value(value: Any) -> Any:
    """What stands for an attribute in a key: -0.0 is not 0.0, nor 1 True.

    Of a tensor, which is read at each call, its class; so of anything else, of which no step is
    read.
    """
    if type(value) is tuple:
        return tuple(map(plain_value, value))
    if isinstance(value, BY_IDENTITY):
        return value
    if is_plain_array(value):  # whose repr is of 8 digits, or as numpy is told
        return type(value), value.dtype, value.tobytes()
    return (type(value), repr(value)) if is_plain(value) else type(value)
