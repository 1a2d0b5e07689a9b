"""What the code of a step reads of neither the neuron nor its arguments, as a global number."""

from __future__ import annotations

import dis
import enum
import re
import sys
from collections.abc import Collection, Iterator
from operator import attrgetter, itemgetter
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from .program import NotRead

#: the methods that a step begins with, of a neuron and of a module within it
STARTS = (
    *("single_step_functional_forward", "multi_step_functional_forward", "single_step_forward"),
    *("multi_step_forward", "neuronal_charge", "neuronal_fire", "neuronal_reset", "forward"),
)
#: packages whose functions read nothing else that may change
_KNOWN = {"torch", "numpy", "spikingjelly", "sj_taid", *sys.stdlib_module_names}
#: names of what a copy's step finds other than a call's, or which gives attributes unseen
_FORBIDDEN = frozenset(
    (
        *("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"),
        *("get_default_dtype", "type", "__class__", "__dict__", "vars", "globals", "locals"),
        *("eval", "exec", "environ", "getenv", "_memories", "_memories_rv", "_modules", "children"),
        *("named_children", "modules", "named_modules", "get_submodule", "state_dict"),
        "get_reset_value",
    )
)
#: what a scripted function may ask a tensor for
_OF_SCRIPTS = frozenset(
    ["size", "numel", "len", "stride", "is_contiguous", "requires_grad", "storage_offset", "sizes"]
)
#: what does not change under its name, but by a hand that changes the program
_FIXED = (
    *(type, FunctionType, BuiltinFunctionType, ModuleType, property, staticmethod, classmethod),
    *(enum.Enum, np.ufunc, torch.jit.ScriptFunction),
)
#: what a name may be given to in place of another
_CODE = (type, FunctionType, BuiltinFunctionType, MethodType, torch.jit.ScriptFunction)
#: numbers and the like, which a key holds by their values
PLAIN = (bool, int, float, str, type(None), np.generic, torch.dtype)


def is_plain(value: Any) -> bool:
    """Whether it is a number or the like, or a tuple of such."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, PLAIN) or (isinstance(value, np.ndarray) and value.ndim == 0)


def is_fixed(value: Any, owner: Any = None) -> bool:
    """Whether it is code or the like, without a state that its calls may read."""
    if isinstance(value, MethodType | BuiltinFunctionType):  # a builtin's is its module or class
        return value.__self__ is owner or isinstance(value.__self__, type | ModuleType | None)
    return isinstance(value, _FIXED)


def is_own(value: Any) -> bool:
    """Whether it is a class or a function of the user's."""
    return isinstance(value, type | FunctionType) and not _is_known(_home(value))


def check_code(kind: type, function: Any = None) -> dict[Any, Any]:
    """What the steps of a class, or a function, read from outside that may be another, and how.

    Numbers, and functions and classes under a name that may be given to others.

    Raises:
        NotRead: they read what may change unseen.
    """
    walk = _Walk()
    if function is not None:
        walk.value(kind, "function", function, set(), False)
    for name in STARTS if function is None else ():
        walk.method(kind, name)
    return walk.outside


def names_of(function: Any) -> set[str]:
    """The names of attributes and globals in a function's code."""
    return _names(function.__code__)


class _Walk:
    """Goes from a method to all that its code names, as far as that can be seen."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.outside: dict[Any, Any] = {}  #: (of what, name) -> it, and what gives the value

    def method(self, owner: type, name: str, names: Collection[str] = ()) -> None:
        """What a class has under a name, in a function that has these ``names``."""
        is_overridden = False
        for kind in owner.__mro__:
            value = vars(kind).get(name)
            if is_overridden and isinstance(value, FunctionType):  # which super() calls
                self._note(kind, name, attrgetter(name))
            is_overridden |= value is not None
            if isinstance(value, type | ModuleType) and name[:2] != "__":
                self.value(owner, name, value, {*names}, False)
            if isinstance(value, classmethod):
                self._attributes(owner.__name__, owner, _names(value.__func__.__code__))
            function = value.fget if isinstance(value, property) else value
            self._function(owner, getattr(function, "__func__", function))

    def _function(self, owner: type, function: Any) -> None:
        if (wrapped := getattr(function, "__wrapped__", None)) is not None:
            self._function(owner, wrapped)
        if isinstance(function, torch.jit.ScriptFunction):
            _check_script(function)
        key = owner, function
        if not isinstance(function, FunctionType) or key in self.seen:
            return
        self.seen.add(key)
        home, names = _home(function), _names(function.__code__)
        is_known = _is_known(home)
        if not is_known:
            self._check(function, names)
        elif "torch" in str(home):
            names = set()
        for name in names:
            self.method(owner, name, () if is_known else names)
        for name, cell in _cells(function):
            if not is_known and name != "__class__":
                self._note(cell, "", attrgetter("cell_contents"))
            self.value(owner, name, cell.cell_contents, names, is_known)
        if not is_known:
            space = function.__globals__
            for name in {*_globals_of(function.__code__)} & space.keys():
                self._note(space, name, itemgetter(name))
                self.value(owner, name, space[name], names, is_known)

    def _note(self, home: Any, name: str, get: Any) -> None:
        """Note what may be another at the next call: a number, a function or a class."""
        value = get(home)
        if is_plain(value) or isinstance(value, _CODE):
            self.outside[id(home), name] = home, get

    def _check(self, function: FunctionType, names: set[str]) -> None:
        """Refuse what may be another at the next call, and writes, which would be lost."""
        code, stored, before = function.__code__, set(), None
        if found := names & _FORBIDDEN:
            raise NotRead(f"asks for {min(found)!r}, which may be another at the next call")
        for line in _lines(code):
            is_free = line.opname.endswith("_DEREF") and line.argval in code.co_freevars
            if line.opname == "STORE_GLOBAL" or (is_free and line.opname == "STORE_DEREF"):
                raise NotRead(f"sets {line.argval!r} outside of it")
            if line.opname == "IMPORT_NAME" and not _is_known(line.argval):
                raise NotRead(f"imports {line.argval!r}, which may change unseen")
            if line.opname == "STORE_ATTR":
                stored.add(line.argval)
            if before == "getattr" and (is_free or line.opname in ("LOAD_GLOBAL", "LOAD_NAME")):
                raise NotRead(f"asks for an attribute of {line.argval!r}: write its name")
            before = line.argval
        homes = {n: cell.cell_contents for n, cell in _cells(function) if n != "__class__"}
        homes |= {n: function.__globals__.get(n) for n in _globals_of(code)}
        for name, home in homes.items():
            if not isinstance(home, type | ModuleType | FunctionType) or _is_known(_home(home)):
                continue
            if found := stored & {*dir(home)}:
                raise NotRead(f"sets {name}.{min(found)} outside of it")
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            is_home = isinstance(value, type | ModuleType) and not _is_known(_home(value))
            is_code = is_fixed(value) and not is_home
            if not (is_plain(value) or is_code or isinstance(value, torch.Tensor)):
                kind = type(value).__name__
                raise NotRead(f"has a {kind} as a default, which may change unseen: take a tuple")

    def value(self, owner: type, name: str, value: Any, names: set[str], is_known: bool) -> None:
        """What a function reads under a name that is none of its own."""
        if is_plain(value):
            return
        if isinstance(value, type | ModuleType):
            looked = id(value), frozenset(names)
            if _is_known(_home(value)) or isinstance(value, enum.EnumMeta) or looked in self.seen:
                return
            self.seen.add(looked)
            self._attributes(name, value, names)
            if isinstance(value, type) and value not in owner.__mro__ and value not in self.seen:
                self.seen.add(value)
                for method in [m for m in vars(value) if m[:2] != "__" or m == "__call__"]:
                    self.method(value, method)
        elif not (is_known or is_fixed(value)):
            raise NotRead(
                f"reads {name!r} from outside of it, which may change unseen: make it its own"
            )
        if isinstance(getattr(value, "__self__", None), type):  # as a Function's apply
            self.value(owner, name, value.__self__, names, is_known)
        if isinstance(value, FunctionType) and not is_known and (found := names & {*vars(value)}):
            raise NotRead(f"reads {name}.{min(found)} from outside, which may change unseen")
        self._function(owner, getattr(value, "__func__", value))

    def _attributes(self, name: str, home: Any, names: set[str]) -> None:
        """What is read of a class or of a module of Python."""
        for attribute in names & {*dir(home)}:
            value = getattr(home, attribute, None)
            if is_plain(value) or attribute[:2] != "__":
                self._note(home, attribute, attrgetter(attribute))
            if not (is_plain(value) or is_fixed(value)):
                raise NotRead(f"reads {name}.{attribute} from outside, which may change unseen")
            if isinstance(value, type | ModuleType) and attribute[:2] != "__":
                self.value(object, f"{name}.{attribute}", value, names, False)
            if isinstance(home, ModuleType):
                self._function(object, value)


def _check_script(function: Any) -> None:
    """Refuse a scripted function that asks a tensor what it is, which runs where nobody sees."""
    home = getattr(getattr(function, "_torchdynamo_inline", None), "__module__", None)
    asked = {*re.findall(r"::(\w+)", str(function.inlined_graph))} & _OF_SCRIPTS
    if asked and not _is_known(home):
        raise NotRead(f"calls a scripted function that asks for {min(asked)!r}")


def _is_known(module: Any) -> bool:
    return str(module).partition(".")[0] in _KNOWN


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of functions within it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _names(code: CodeType) -> set[str]:
    return {name for inner in _codes(code) for name in inner.co_names}


def _lines(code: CodeType) -> Iterator[dis.Instruction]:
    for inner in _codes(code):
        yield from dis.get_instructions(inner)


def _globals_of(code: CodeType) -> Iterator[str]:
    for line in _lines(code):
        if line.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield line.argval


def _cells(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables of outer functions that a function reads, by name."""
    yield from zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)


def _home(value: Any) -> str:
    """The module of a class or a function; a module's own name."""
    if isinstance(value, FunctionType):  # one that wraps another has the other's __module__
        return str(value.__globals__.get("__name__"))
    return value.__name__ if isinstance(value, ModuleType) else value.__module__
