"""The backends: their names, whether they work here and why not, and which one runs a call.

A :class:`Backend` has these functions:

* ``multi_step(x_seq, v, w, v_threshold, *, ...)`` with the signature and the results of
  :func:`sj_taid.ops.step.reference.multi_step`;
* ``unsupported(x_seq)``: why it cannot take this input, or ``None``;
* the functions of its ``engine``, if it has fused kernels.

:data:`BACKENDS` holds functions that import these modules, so that a backend costs nothing until it
is used and may fail to import without breaking the others.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._internal.graph import constant_in_graphs, is_watched
from . import bits
from .step import reference

AUTO = "auto"
ENVIRONMENT_VARIABLE = "SJ_TAID_BACKEND"


class Backend(NamedTuple):
    """One way to run neurons."""

    multi_step: Callable[..., tuple[Any, ...]]
    unsupported: Callable[[Tensor], str | None]
    #: what makes plans of its fused kernels, a :class:`.plan.Engine`; ``None`` if it has none
    engine: Any = None


class BackendUnavailableError(RuntimeError):
    """The backend asked for by name cannot run here, or cannot run this call."""


def _torch() -> Backend:
    return Backend(reference.multi_step, lambda x_seq: None)


def _numba() -> Backend:
    from .step import cpu

    return Backend(cpu.multi_step, cpu.unsupported, cpu.ENGINE)


def _cupy() -> Backend:
    if torch.version.cuda is None:  # CuPy may find a GPU that this torch does not
        raise ImportError(f"torch {torch.__version__} is built without CUDA")
    from .step import cuda

    return Backend(cuda.multi_step, cuda.unsupported, cuda.ENGINE)


#: Name -> a function that imports the backend, or raises the original exception.
BACKENDS: dict[str, Callable[[], Backend]] = {"torch": _torch, "numba": _numba, "cupy": _cupy}

#: Name -> what it needs, for messages.
NEEDS: dict[str, str] = {
    "numba": "pip install numba",
    "cupy": "a torch of CUDA, an NVIDIA driver and, to match torch.version.cuda, "
    f'pip install "cupy-cuda{(torch.version.cuda or "13").partition(".")[0]}x[ctk]>=14.2"',
}

#: Device type -> the names "auto" tries, best first; other devices take torch.
#: numba has no least size: at one step of up to 8,000 neurons it takes 0.5 to 0.6 of torch's time
#: without gradients and 1.1 to 1.2 with them, and less than torch everywhere else. cupy gets one
#: when experiments/benchmark/neuron.py has measured it on a GPU.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("numba",), "cuda": ("cupy",)}


_warned: set[str] = set()


@cache
def engine_of(device: str) -> Any:
    """What packs spikes on a device: the engine of the best backend that works, or :mod:`.bits`."""
    working = (BACKENDS[name]() for name in PREFERENCE.get(device, ()) if works(name))
    return next((backend.engine for backend in working), bits)


def names() -> tuple[str, ...]:
    """Every name that ``backend=`` takes.

    >>> "auto" in names() and "torch" in names()
    True
    """
    return (AUTO, *BACKENDS)


def check_name(name: str, argument: str = "backend") -> str:
    """Return ``name`` if it is a backend's, or raise a ``ValueError`` that lists them."""
    if name not in names():
        raise ValueError(
            f"{argument}={name!r} is unknown: expected one of {', '.join(map(repr, names()))}"
        )
    return name


def why_not(name: str) -> Exception | None:
    """Why the backend ``name`` does not work on this machine: the original exception, or ``None``.

    >>> why_not("torch") is None
    True
    """
    return _failure_of(BACKENDS[check_name(name)])


def works(name: str) -> bool:
    """Whether ``name`` is a backend, and works on this machine."""
    return name in BACKENDS and why_not(name) is None


@cache  # each try would search all of sys.path
def _failure_of(load: Callable[[], Backend]) -> Exception | None:
    try:
        load()
    except Exception as error:  # any failure of an optional dependency
        return error
    return None


def resolve(name: str, x_seq: Tensor) -> Backend:
    """The backend that runs this call.

    An explicit ``name`` runs or raises :class:`BackendUnavailableError`, from the original
    exception. ``"auto"`` takes the environment variable ``SJ_TAID_BACKEND`` if set (as an explicit
    name), else the best backend for the tensor's device that works, and says once why a better one
    does not. It takes torch silently for float64, during ``torch.export``, and while a
    ``TorchDispatchMode`` watches, such as SpikingJelly's operation counters.
    """
    check_name(name)
    if name == AUTO:
        name = check_name(os.environ.get(ENVIRONMENT_VARIABLE) or AUTO, ENVIRONMENT_VARIABLE)
    if name != AUTO:
        found = _find(name, x_seq)
        if isinstance(found, str):
            raise BackendUnavailableError(found) from why_not(name)
        return found
    # float64 is chosen where exactness counts, and only torch computes in it; an exported program
    # should run where this package is not installed.
    is_double = x_seq.dtype == torch.float64
    torch_only = is_double or is_watched() or torch.compiler.is_exporting()
    for candidate in () if torch_only else PREFERENCE.get(x_seq.device.type, ()):
        found = _find(candidate, x_seq)
        if not isinstance(found, str):
            return found
        warn_once(f"{found}. Falling back from {candidate!r}; say backend=... to choose.")
    return _torch()


def _find(name: str, x_seq: Tensor) -> Backend | str:
    """The backend, or why it cannot run this call."""
    if reason := _describe_failure(name):
        return reason
    backend = BACKENDS[name]()
    reason = backend.unsupported(x_seq)
    return f"backend {name!r} cannot take this call: {reason}" if reason else backend


def is_chosen(name: str) -> bool:
    """Whether a backend was asked for by its name, or by the environment's."""
    return name != AUTO or os.environ.get(ENVIRONMENT_VARIABLE, AUTO) != AUTO


def needed_by(name: str) -> str:
    """What a backend needs, in words."""
    return NEEDS.get(name, "what its import says")


@constant_in_graphs
def _describe_failure(name: str) -> str | None:
    error = why_not(name)
    if error is None:
        return None
    return (
        f"backend {name!r} is not available here: {type(error).__name__}: {error}. "
        f"It needs {needed_by(name)}"
    )


@constant_in_graphs
def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
