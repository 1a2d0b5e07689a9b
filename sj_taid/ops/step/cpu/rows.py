"""The rows of a program, compiled by numba and cached on disk."""

# numba infers the types of the functions that it compiles.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import hashlib
import math
import os
import stat
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import cfunc, config
from numba.core.caching import _CacheLocator
from numba.extending import register_jitable

from .. import text
from ..program import Program
from .loops import PITCH, ROW_SIGNATURE

_smooth = register_jitable(error_model="numpy", fastmath={"contract"})


@_smooth
def _exp(x):
    """Vectorisable ``e**x`` in float32, to 2 ulp."""
    x = np.float32(89) if x > np.float32(89) else x
    x = np.float32(-104) if x < np.float32(-104) else x
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    # ln 2 in two parts, the first short enough for n times it to be exact
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1 / 5040)
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = p * r + np.float32(c)
    # 2**n in two factors, since neither 2**128 nor 2**-127 is a normal number
    half = np.int32(n) >> np.int32(1)
    return p * _power_of_2(half) * _power_of_2(np.int32(n) - half)


@_smooth
def _power_of_2(n):
    return np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@_smooth
def _sigmoid(x):
    return np.float32(1) / (np.float32(1) + _exp(-x))


@_smooth
def _tanh(x):
    """Vectorisable: a polynomial near 0, where the quotient would lose digits."""
    a, z = abs(x), x * x
    p = np.float32(-5.70498872745e-3)
    for c in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        p = p * z + np.float32(c)
    far = np.float32(1) - np.float32(2) / (_exp(a + a) + np.float32(1))
    near = x if z == np.float32(0) else p * z * x + x  # -0.0 stays so
    return near if a < np.float32(0.625) else (far if x > np.float32(0) else -far)


_NAMES = {
    "f32": np.float32, "ZERO": np.float32(0), "ONE": np.float32(1), "PITCH": PITCH,
    "exp": _exp, "sigmoid": _sigmoid, "tanh": _tanh, "sqrt": np.sqrt, "rint": np.rint,
    "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "sin": np.sin, "cos": np.cos,
    "log": np.log, "log1p": np.log1p, "expm1": np.expm1, "erf": math.erf, "atan": np.arctan,
}  # fmt: skip
#: what a compiled row depends on apart from its text
_BASE = hashlib.sha256(Path(__file__).read_bytes() + numba.__version__.encode()).hexdigest()


@lru_cache(maxsize=1024)
def address_of(
    program: Program, layout: tuple[int, int, int], norm: bool, totals: Sequence[int] | None
) -> int:
    """The address of a row: forward without ``totals``, else backward to sums of these."""
    where = text.Layout(*layout)
    if totals is None:
        source = text.forward_row(program, where, norm)
    else:
        source = text.backward_row(program, where, norm, totals)
    row = compile_row(source)
    _ALIVE.append(row)
    return row.address


#: compiled rows, whose code must stay
_ALIVE: list[Any] = []


def compile_row(source: str) -> Any:
    """A C function of the text of a row."""
    name = hashlib.sha256((_BASE + source).encode()).hexdigest()[:32]
    # numba's linker distinguishes functions by their names, and keeps one of two that are equal.
    source = source.replace("def row(", f"def row_{name}(", 1)
    path = cached(name, source)
    space = {**_NAMES, "__name__": __name__}  # which numba imports when it loads the compiled code
    exec(compile(source, str(path or f"<row {name}>"), "exec"), space)
    function = space[f"row_{name}"]
    return cfunc(ROW_SIGNATURE, cache=path is not None, error_model="numpy")(function)


def cached(name: str, source: str) -> Path | None:
    """The file of this text in the cache, which numba keeps the compiled code next to."""
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / f"{name}.py"
    try:
        if not (path.is_file() and path.read_bytes() == source.encode()):
            with tempfile.NamedTemporaryFile("wb", dir=folder, suffix=".tmp", delete=False) as file:
                file.write(source.encode())
            Path(file.name).replace(path)
    except OSError as error:
        _warn(str(error))
        return None
    return path


@lru_cache(maxsize=1)
def cache_folder() -> Path | None:
    """Where compiled rows are kept, or ``None``: folders that nobody else may write to."""
    own = config.CACHE_DIR  # type: ignore[attr-defined]
    home = own or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home).absolute() / "sj_taid"
    # numba keeps the compiled code in NUMBA_CACHE_DIR itself, or next to the text.
    code = Path(home, _CacheLocator.get_suitable_cache_subpath(str(folder / "row.py")))
    for place in (folder, code.absolute()) if own else (folder,):
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = place.stat()
        except OSError as error:
            return _warn(str(error))
        others = stat.S_IWGRP | stat.S_IWOTH
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & others):
            return _warn(f"others may write to {place}")
    return folder


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"compiled neurons are kept in no folder ({reason}): they compile again in every process. "
        "Set NUMBA_CACHE_DIR to a folder of your own",
        RuntimeWarning,
        stacklevel=2,
    )
