"""A copy of a module that notes what its step reads: the key of all that is made of the step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from functools import cache
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn

from ..._internal import compat
from .code import check_code, is_fixed, is_plain
from .program import NotRead, Reading
from .read import read

#: packages whose functions of a sequence are known to run its steps
_OWN = ("spikingjelly", "sj_taid")
#: where a module keeps hooks on its calls
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: attributes that every module has, and that a call reads
_OF_MODULES = {*vars(base.MemoryModule()), *dir(nn.Module)} - {
    *("training", "_step_mode", "_backend"),
}
#: what gives attributes of a module without their names
_UNSEEN = frozenset(
    (
        *("__dict__", "_modules", "_memories", "_memories_rv", "children", "named_children"),
        *("modules", "named_modules", "get_submodule", "state_dict", "get_reset_value"),
    )
)


class Notes:
    """What a step reads of a module and of the modules within, by dotted names."""

    def __init__(self) -> None:
        self.states: dict[str, None] = {}
        self.numbers: dict[str, None] = {}
        self.tensors: dict[str, None] = {}
        self.modules: dict[str, None] = {}
        self.outside: dict[Any, Any] = {}  #: numbers that its code names: :func:`.code.check_code`
        self.is_loop = False  #: whether the step is found in what runs a sequence
        #: of modules of SpikingJelly's within, during a step, and the attributes that they had
        self.copies: dict[int, Any] = {}

    def note(self, owner: Any, name: str, value: Any) -> Any:
        """Note an attribute; gives what stands for it."""
        _, tensors, home = vars(owner)["_taid_notes"]
        path = home + name
        if name in _OF_MODULES:
            return value
        if isinstance(value, nn.Module):
            return self._note_module(owner, path, value)
        is_property = isinstance(getattr(type(owner), name, None), property)
        if is_property or (name not in vars(owner) and is_fixed(value, owner)):
            is_unknown = name.startswith("multi_step_") and not self.is_loop
            if is_unknown and value.__module__.partition(".")[0] not in _OWN:
                raise NotRead(f"is run by {name!r} of {value.__module__}, which may be no step")
            return value  # a property's is made of what was noted
        if isinstance(value, Tensor):
            if path not in tensors:
                raise NotRead(f"reads {path!r}, a tensor of its class or of a module within it")
            self.tensors[path] = None
            return tensors[path]
        if isinstance(value, FunctionType | BuiltinFunctionType | MethodType):
            if hasattr(type(owner), name):
                raise NotRead(f"calls {path!r}, which was replaced in this neuron alone")
            if not is_fixed(value):
                raise NotRead(f"calls {path!r}, a method of an object, which may change unseen")
            self.outside |= check_code(value)
        elif not is_plain(value):
            kind = type(value).__name__
            remedy = "take a tuple" if "_memories" in vars(owner) else f"remove self.{path}"
            raise NotRead(
                f"reads its attribute {path!r}, a {kind}, which may change unseen: {remedy}"
            )
        self.numbers[path] = None
        return value

    def _note_module(self, owner: Any, path: str, module: Any) -> Any:
        """Note a module within; gives a copy that notes what is read of it."""
        own = vars(module)
        if "_taid_notes" in own:  # a property gives one that is noted
            return module
        self.modules[path] = None
        if any(own.get(hooks) for hooks in HOOKS):
            raise NotRead(f"calls a module with hooks ({path})")
        if own["_parameters"] or own["_buffers"] or own["_modules"] or "_memories" in own:
            raise NotRead(f"calls a module with parameters or modules of its own ({path})")
        if path not in vars(owner)["_modules"]:
            raise NotRead(f"calls a module of its class or of a module within it ({path})")
        if any(map(callable, own.values())):
            raise NotRead(f"calls a module with functions of its own ({path})")
        if type(module).__module__.startswith("spikingjelly."):
            return self._note_known(path, module)
        self.outside |= check_code(type(module))
        return recording(module, self, {}, f"{path}.")

    def _note_known(self, path: str, module: Any) -> Any:
        """Note all numbers of a module of SpikingJelly's, which asks for its very class."""
        copied = object.__new__(type(module))
        vars(copied).update(vars(module))
        for name in {*vars(module), *dir(type(module))} - _OF_MODULES:
            if is_plain(getattr(module, name, [])):
                self.numbers[f"{path}.{name}"] = None
        self.copies[id(copied)] = copied, dict(vars(copied))
        return copied


def recording(module: Any, notes: Notes, tensors: Any, home: str = "") -> Any:
    """A shallow copy of ``module`` that notes what is read of it; it may set its states alone."""
    kind: Any = getattr(module, "_taid_kind", type(module))
    copied = _copy(module, _recording_class(kind))
    vars(copied)["_taid_notes"] = notes, tensors, home
    return copied


def _copy(module: Any, kind: Any) -> Any:
    """A shallow copy of another class."""
    copied: Any = object.__new__(kind)
    own = copied.__dict__
    own.update(vars(module))
    for name in ("_parameters", "_buffers", "_modules", "_memories"):
        if name in own:
            own[name] = dict(own[name])
    return copied


@cache
def _recording_class(kind: Any) -> Any:
    """A subclass of ``kind`` whose instances note what is read of them."""

    def __getattribute__(self: Any, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if "_taid_notes" in own and name in own["_taid_notes"][1]:  # a property may give it, too
            notes, tensors, _ = own["_taid_notes"]
            notes.tensors[name] = None
            return tensors[name]
        if name == "store_v_seq" and not _is_of_user(sys._getframe(1)):
            return False  # a sequence of one step keeps no voltages
        if name in _UNSEEN and _is_of_user(sys._getframe(1)) and "_taid_notes" in own:
            raise NotRead(f"asks for {name!r}, which gives attributes unseen: write their names")
        value = kind.__getattribute__(self, name)
        return value if name == "__dict__" else _noted(self, name, value)

    def __getattr__(self: Any, name: str) -> Any:
        try:
            value = kind.__getattr__(self, name)
        except AttributeError as error:
            raise NotRead(f"asks for {name!r}, which it does not have") from error
        return _noted(self, name, value)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        own = vars(self)
        if name not in own.get("_memories", ()):
            what = "changes a module within it: sets" if own["_taid_notes"][2] else "sets"
            remedy = (
                "register_memory makes it a state" if "_memories" in own else f"remove self.{name}"
            )
            raise NotRead(f"{what} its attribute {name!r}: {remedy}")
        own["_memories"][name] = value

    names: dict[str, Any] = {"__getattribute__": __getattribute__, "__setattr__": __setattr__}
    names |= {"__getattr__": __getattr__, "__init_subclass__": lambda **kwargs: None}
    names |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_Quiet, kind), names)


class _Quiet:
    """Leaves out the hook of a class that keeps a list of its subclasses."""

    def __init_subclass__(cls) -> None: ...


def _is_of_user(frame: Any) -> bool:
    """Whether a call is of the user's code, not of torch's or SpikingJelly's."""
    return frame.f_globals.get("__name__", "").partition(".")[0] not in (*_OWN, "torch")


def _noted(self: Any, name: str, value: Any) -> Any:
    own = object.__getattribute__(self, "__dict__")
    about = own.get("_taid_notes")
    if about is None or name == "_taid_notes":
        return value
    if name in own.get("_memories", ()):
        about[0].states[name] = None
        return value
    return about[0].note(self, name, value)


class Neuron:
    """A neuron's step as it can be read: how it runs on a copy, its states and tensors."""

    def __init__(
        self,
        node: Any,
        run: Callable[[Any, Tensor, dict[str, Any]], Any],
        only: Collection[str] | None = None,
    ) -> None:
        """``run(copy, x, states)`` gives the output and the next states by name.

        ``only``: the tensors that are read, if that is known.
        """
        self.node, self.run, self.notes = node, run, Notes()
        memories = vars(node).get("_memories", {})
        self.states = [name for name, value in memories.items() if is_state(name, value)]
        self.tensors: dict[str, Tensor] = {}
        if hasattr(node, "_taid_tensors"):
            given = node._taid_tensors()
            self.tensors = dict(zip(("w", "v_threshold")[-len(given) :], given, strict=True))
            return
        for home in (node._parameters, node._buffers, vars(node)):
            found = {n: t for n, t in home.items() if isinstance(t, Tensor)}
            self.tensors |= {n: t for n, t in found.items() if only is None or n in only}

    @compat.quiet_triton()
    def read(self, shape: Sequence[int], notes: Notes) -> Reading:
        """The step for inputs of this shape; notes what it reads, up to where it cannot be read."""
        self.notes = notes
        if not hasattr(self.node, "_taid_tensors"):
            notes.outside |= check_code(getattr(self.node, "_taid_kind", type(self.node)))
        return read(self.step, len(self.states), list(self.tensors.values()), shape)

    def step(
        self, x: Tensor, states: Sequence[Any], tensors: Sequence[Tensor]
    ) -> tuple[Tensor, list[Any]]:
        """One step of a copy with other states and tensors."""
        notes = self.notes
        notes.copies.clear()
        copied = recording(self.node, notes, dict(zip(self.tensors, tensors, strict=True)))
        memories = copied.__dict__["_memories"]
        if getattr(self.run, "as_in_training", False):
            copied.__dict__["training"] = True
        memories.update(zip(self.states, states, strict=True))
        others = {k: v for k, v in memories.items() if k not in self.states}
        own = dict(vars(copied))
        output, after = self.run(copied, x, memories)
        if _is_changed(vars(copied), own):
            raise NotRead("sets an attribute")
        if any(_is_changed(vars(module), kept) for module, kept in notes.copies.values()):
            raise NotRead("changes a module within it")
        if after is not memories and notes.states:
            name = next(iter(notes.states))
            raise NotRead(f"reads its state {name!r} of itself, not of what it is given")
        for name, value in others.items():
            if after.get(name, value) is not value:
                raise NotRead(f"changes its state {name!r}, which is no number or tensor")
        return output, [after[name] for name in self.states]

    def starts(self, x_seq: Tensor) -> list[Any]:
        """The states that a new neuron's first step is given: numbers where it makes no tensors."""
        memories = vars(self.node)["_memories"]
        values = {}
        for name, value in memories.items():
            value = compat.reset_value(self.node, name) if isinstance(value, Tensor) else value
            values[name] = 0.0 if isinstance(value, Tensor) else value
        make = getattr(self.node, "materialize_states", None)
        if make is not None and self.run.__module__ == compat.__name__:
            values = dict(zip(values, make((x_seq,), tuple(values.values()), "m"), strict=True))
        return [values[name] for name in self.states]

    def run_sequence(self, x_seq: Tensor, states: Any, tensors: Any, step: Any = None) -> Any:
        """The outputs of a sequence, step by step, and the last states."""
        outputs = []
        for x in x_seq:
            output, states = (step or self.step)(x, states, tensors)
            if not isinstance(output, Tensor) or output.shape != x.shape:
                raise NotRead("has an output of another shape where its states are numbers")
            outputs.append(output)
        x = x_seq[0]
        states = [s if isinstance(s, Tensor) else torch.full_like(x, s) for s in states]
        return [torch.stack(outputs), *states]

    def plain_step(
        self, x: Tensor, states: Sequence[Any], tensors: Sequence[Tensor]
    ) -> tuple[Tensor, list[Any]]:
        """One step of a copy of its very class."""
        copied = _copy(self.node, getattr(self.node, "_taid_kind", type(self.node)))
        own: Any = vars(copied)
        for name, tensor in zip(self.tensors, tensors, strict=True):
            homes = (own[home] for home in ("_parameters", "_buffers") if name in own[home])
            next(homes, own)[name] = tensor
        own["training"] |= getattr(self.run, "as_in_training", False)
        own["_memories"].update(zip(self.states, states, strict=True))
        output, after = self.run(copied, x, own["_memories"])
        return output, [after[name] for name in self.states]


def _is_changed(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether an attribute is another object."""
    return now.keys() != before.keys() or any(now[k] is not v for k, v in before.items())


def is_state(name: str, value: Any) -> bool:
    """Whether a memory is a state: not every voltage, which 0.0.0.0.14 keeps among them."""
    if name == "v_seq":
        return False
    return isinstance(value, float | int | Tensor) and not isinstance(value, bool)
