"""What an attribute or a name may be: a number, which a key holds, or code, which is read again.

And what of code is looked at before it is run: writes outside of it, which a copy's step would
make and a compiled one would not, and scripted functions, which run where nobody sees.
"""

from __future__ import annotations

import dis
import enum
import re
import sys
from collections.abc import Iterator
from operator import attrgetter, itemgetter
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from .program import NotRead

#: what has no state that its calls may read
_FIXED = (
    *(type, FunctionType, BuiltinFunctionType, ModuleType, property, staticmethod, classmethod),
    *(enum.Enum, np.ufunc, torch.jit.ScriptFunction),
)
#: numbers and the like, which a key holds by their values
PLAIN = (bool, int, float, str, type(None), torch.dtype)
#: packages whose code is not looked at
_KNOWN = {"torch", "numpy", "spikingjelly", "sj_taid", *sys.stdlib_module_names}
#: what a scripted function may ask a tensor for
_OF_SCRIPTS = frozenset(
    (
        *("size", "numel", "len", "stride", "is_contiguous", "requires_grad", "storage_offset"),
        *("sizes", "dtype"),
    )
)


def is_plain(value: Any) -> bool:
    """Whether it is a number or the like, or a tuple of such; no subclass, which may carry more."""
    if type(value) is tuple:
        return all(map(is_plain, value))
    return type(value) in PLAIN or is_plain_array(value)


def is_plain_array(value: Any) -> bool:
    """Whether it is a number of numpy's, or an array of no axes."""
    is_one = isinstance(value, np.generic) or (type(value) is np.ndarray and value.ndim == 0)
    return is_one and not value.dtype.hasobject


def is_fixed(value: Any, owner: Any = None) -> bool:
    """Whether it is code or the like, without a state that its calls may read."""
    if isinstance(value, MethodType | BuiltinFunctionType):  # a builtin's is its module or class
        return value.__self__ is owner or isinstance(value.__self__, type | ModuleType | None)
    return isinstance(value, _FIXED)


def check_code(start: Any) -> dict[Any, Any]:
    """The numbers that a class's methods, or a function, name: (of what, name) -> it, its getter.

    Globals, and variables of outer functions; of the user's code and the functions that it names.

    Raises:
        NotRead: it writes outside of it, or scripted functions of it ask a tensor for a size.
    """
    outside: dict[Any, Any] = {}
    for function in _functions_of(start):
        _check_writes(function)
        homes: Any = [(function.__globals__, n, itemgetter(n)) for n in _globals_of(function)]
        homes += [(cell, "", attrgetter("cell_contents")) for cell in function.__closure__ or ()]
        for home, name, get in homes:
            if is_plain(_value(home, get)):
                outside[id(home), name] = home, get
    return outside


def _functions_of(start: Any) -> Iterator[FunctionType]:
    """The functions of a class, or a function, and those that they name; the user's alone."""
    left, seen = [start], []
    while left:
        value = left.pop()
        if isinstance(value, property | staticmethod | classmethod):
            value = value.fget if isinstance(value, property) else value.__func__
        if isinstance(value, MethodType | BuiltinFunctionType):  # as a Function's apply
            left += [getattr(value, "__func__", None), value.__self__]
        if not isinstance(value, type | FunctionType | torch.jit.ScriptFunction) or value in seen:
            continue
        seen.append(value)
        if isinstance(value, torch.jit.ScriptFunction):
            _check_script(value)
        elif isinstance(value, type):
            own = [kind for kind in value.__mro__ if not _is_known(kind.__module__)]
            left += [part for kind in own for part in vars(kind).values()]
        elif not _is_known(value.__globals__.get("__name__")):
            yield value
            found = [value.__globals__[name] for name in _globals_of(value)]
            found += [_value(cell, attrgetter("cell_contents")) for cell in value.__closure__ or ()]
            modules = [m for m in found if isinstance(m, ModuleType) and not _is_known(m.__name__)]
            names = {n for code in _codes(value.__code__) for n in code.co_names}
            left += found + [getattr(m, n, None) for m in modules for n in names]


def _check_writes(function: FunctionType) -> None:
    code, before = function.__code__, None
    for line in instructions_of(code):
        is_free = line.opname.endswith("_DEREF") and line.argval in code.co_freevars
        if line.opname == "STORE_GLOBAL" or (is_free and line.opname == "STORE_DEREF"):
            raise NotRead(f"sets {line.argval!r} outside of it")
        if line.opname == "STORE_ATTR" and before is not None:
            raise NotRead(f"sets {before}.{line.argval} outside of it")
        is_outside = is_free or line.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        before = line.argval if is_outside else None


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


def instructions_of(code: CodeType) -> Iterator[dis.Instruction]:
    """The instructions of a function, and of those that are defined in it."""
    for inner in _codes(code):
        yield from dis.get_instructions(inner)


def _globals_of(function: FunctionType) -> set[str]:
    """The globals that a function's code reads, of those that there are."""
    lines = instructions_of(function.__code__)
    found = {line.argval for line in lines if line.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found & function.__globals__.keys()


def _value(home: Any, get: Any) -> Any:
    """What a cell holds, or a global is; a class of a cell that is still empty."""
    try:
        return get(home)
    except ValueError:
        return object
