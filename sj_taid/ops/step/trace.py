"""Torch runs a step and its gradient on tensors without values; every operation is noted."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..._internal import graph
from .program import MOST_STATES, NotRead

#: ``step(x, states, parameters)`` gives the output and the next states
Step = Callable[[Tensor, Sequence[Any], Sequence[Tensor]], tuple[Tensor, Sequence[Any]]]

#: one reading at a time: torch's modes and random states belong to the process, not to a thread
ONE_READING = threading.RLock()

#: the dtypes of inputs that a kernel takes; it computes in the first
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: operations that make numbers of nothing that is traced
NEW = ("arange", "lift_fresh", "lift_fresh_copy")
#: operations, and their gradients, that are traced as those that torch takes them apart into
DECOMPOSED = frozenset(["gelu", "silu", "elu", "celu", "selu", "mish"])


class Trace(NamedTuple):
    """A step and its gradient as torch ran them."""

    #: what it was given, by name: ``x``, ``s0`` (states), ``w0`` (parameters), ``g`` and ``g0``
    #: (gradients of the output and the next states)
    given: dict[str, Tensor]
    calls: list[Call]  #: all operations
    #: the output, the next states, and the gradients of what was given; ``None`` for what has none
    ends: list[Any]
    reach: Any  #: of what each end alone has gradients, as :attr:`.Program.reach`
    asks_dtype: bool  #: whether the step asks for the dtype of a tensor


def trace_step(
    step: Step, states: int, parameters: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype
) -> Trace:
    """Trace a step and its gradient for an input of a shape and dtype."""
    if states > MOST_STATES:
        raise NotRead(f"has more than {MOST_STATES} states")
    with tracing():
        # Until no mask chooses one neuron alone, which torch treats otherwise.
        for seed in range(16):
            torch.default_generator.manual_seed(seed)
            inputs = [example(shape, dtype) for _ in range(1 + states)]
            inputs += [example(p.shape, dtype_of(p, dtype)) for p in parameters]
            upstream = [example(shape, dtype).detach() for _ in range(1 + states)]
            drawn = random_states()
            recorder, ends, reach = _trace(step, states, inputs, upstream)
            if random_states() != drawn:
                raise NotRead("draws random numbers")
            calls = recorder.calls
            if not any(call.name == "index" and call.result.numel() == 1 for call in calls):
                break
    names = ["x", *(f"s{k}" for k in range(states)), *(f"w{k}" for k in range(len(parameters)))]
    names += ["g", *(f"g{k}" for k in range(states))]
    given = dict(zip(names, (*inputs, *upstream), strict=True))
    return Trace(given, calls, ends, reach, recorder.asks_dtype)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without the caller's modes and hooks, and without drawing its random numbers."""
    with (
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=()),
        saved_tensors_hooks(_same, _same),  # not those of the caller, which may count
    ):
        yield


@contextmanager
def tracing() -> Iterator[None]:
    """Where a step is traced: one at a time, undisturbed."""
    # Scripted functions change as they run.
    with ONE_READING, undisturbed(), torch.jit.optimized_execution(False):
        yield


def random_states() -> tuple[Any, ...]:
    """The states of Python's and numpy's random numbers; torch's are seen by its operations."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return random.getstate(), repr(state["state"])


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Opaque(Tensor):
    """A small tensor whose values nobody can ask for, so that nothing can depend on them."""

    values: Any
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(values: Tensor, requires_grad: bool = False) -> Opaque:
        about: Any = {"strides": values.stride(), "dtype": values.dtype, "device": values.device}
        made = Tensor._make_wrapper_subclass(
            Opaque, values.shape, requires_grad=requires_grad, **about
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise NotRead("asks for a value of a tensor: torch.where takes the place of if")
        args_, kwargs_ = tree_map_only(Opaque, lambda t: t.values, (args, kwargs or {}))
        result = func(*args_, **kwargs_)
        if args and isinstance(args[0], Opaque) and result is args[0].values:
            return args[0]  # changed in place
        return tree_map_only(Tensor, Opaque.of, result)


def example(shape: Any, dtype: torch.dtype) -> Tensor:
    """Random values that have a gradient if they are floats."""
    values = torch.rand(shape, device="cpu").to(dtype)
    return Opaque.of(values, requires_grad=dtype.is_floating_point)


def dtype_of(parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """That of a parameter where the input's is ``dtype``: a plan is given both as float32."""
    return dtype if parameter.dtype in DTYPES else parameter.dtype


class Call(NamedTuple):
    """An operation of torch."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    number: Any = None  #: of an operation that makes one, as it was then

    @property
    def name(self) -> str:
        return self.function._schema.name.split("::")[1]

    @property
    def results(self) -> list[Tensor]:
        """The tensors that it gives."""
        results = self.result if isinstance(self.result, list | tuple) else [self.result]
        return [result for result in results if isinstance(result, Tensor)]


class Recorder(TorchDispatchMode):
    """Notes every operation of torch, those of a backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.error: NotRead | None = None  # which the step may have caught
        self.asks_dtype = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1].removesuffix("_backward") in DECOMPOSED:
            from torch._decomp import decomposition_table

            with self, torch._C.DisableTorchFunction():
                return decomposition_table[func](*args, **(kwargs or {}))
        if func._schema.name == "aten::to":  # as a decomposition casts
            with self:
                return func.decompose(*args, **(kwargs or {}))
        try:
            result = func(*args, **(kwargs or {}))
        except NotRead as error:
            self.error = error
            raise
        call, number = Call(func, args, kwargs or {}, result), None
        if call.name in NEW and type(result) is Tensor and result.numel() == 1:
            number = result.item()
        self.calls.append(call._replace(number=number))
        return result


class _Size(torch.SymInt):
    """A size of the input: torch's functions take it, nothing else can be done with it."""

    def __init__(self, size: int, note: Callable[[str], NotRead]) -> None:
        self.node: Any = None
        self.size, self.note = size, note

    def __eq__(self, other: object) -> Any:
        if isinstance(other, _Size) and other.size == self.size:  # of one axis: all sizes differ
            return True
        return self._compute()

    def _compute(self, *args: Any) -> Any:
        raise self.note(
            "computes or decides something by a size of its input: a layer before it may"
        )

    __hash__ = __bool__ = __int__ = __index__ = __float__ = __repr__ = _compute
    __lt__ = __le__ = __gt__ = __ge__ = __ne__ = _compute
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _compute
    __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __neg__ = _compute


#: what gives sizes of a tensor, and what takes them
_SIZES = frozenset(["shape", "size", "numel", "nelement", "__len__"])
_TAKES_SIZES = frozenset(
    (
        *("view", "reshape", "expand", "broadcast_to", "zeros", "ones", "empty", "full"),
        *("new_zeros", "new_ones", "new_empty", "new_full", "empty_strided"),
    )
)
#: what a call's tensors may answer otherwise, and the questions that all of them answer alike
_ASKED = frozenset(["grad_fn", "grad", "storage", "untyped_storage"])
_ALIKE = frozenset(["is_floating_point", "is_complex", "is_signed", "is_cuda", "is_cpu"])


class _Asked(TorchFunctionMode):
    """Sees what Python asks of tensors: sizes become :class:`_Size`."""

    def __init__(self, recorder: Recorder, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.recorder, self.known = recorder, (1, *channels)  # a reading is for as many channels

    def _note(self, text: str) -> NotRead:
        self.recorder.error = NotRead(text)
        return self.recorder.error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (func.__self__ if func.__name__ == "__get__" else func).__name__
        kwargs = kwargs or {}
        sizes = [a for a in (*args, *kwargs.values()) if isinstance(a, _Size)]
        given = tree_map_only(_Size, lambda size: size.size, (args, kwargs))
        if name not in _TAKES_SIZES or (sizes and name in ("full", "new_full")):
            tree_map_only(_Size, _Size._compute, (args, kwargs))
        result = func(*given[0], **given[1])
        is_asked = name in _ASKED or (isinstance(result, bool) and name not in _ALIKE)
        # SpikingJelly's surrogates ask whether to save for backward.
        if is_asked and not calls_from_spikingjelly():
            raise self._note(f"asks for {name!r}, which may be another at the next call")
        if isinstance(result, torch.dtype | str) and not calls_from_spikingjelly():
            self.recorder.asks_dtype = True
        if name in ("dim", "ndim", "ndimension"):
            return result
        known = self.known if name in _SIZES else ()
        if isinstance(result, tuple) and name in (*_SIZES, "stride"):
            return tuple(n if n in known else _Size(n, self._note) for n in result)
        if type(result) is int:
            return result if result in known else _Size(result, self._note)
        return result


def calls_from_spikingjelly() -> bool:
    """Whether code of SpikingJelly's called the function that calls this."""
    home = sys._getframe(2).f_globals.get("__name__", "")
    return home.partition(".")[0] == "spikingjelly"


def _trace(step: Step, states: int, inputs: Any, upstream: Any) -> tuple[Any, ...]:
    """All operations of a step and of its gradient, and their results, or :class:`NotRead`."""
    x, recorder = inputs[0], Recorder()
    per_channel = any(p.numel() != 1 for p in inputs[1 + states :])
    asked = _Asked(recorder, x.shape[1:2] if per_channel else ())
    try:
        with recorder, torch.enable_grad():
            with asked:
                output, after = step(x, inputs[1 : 1 + states], inputs[1 + states :])
            ends = [output, *after]
            for end in ends:
                if not isinstance(end, Tensor) or end.shape != x.shape or end.dtype != x.dtype:
                    raise NotRead("has an output or state of another shape or dtype than its input")
            pairs = [(end, g) for end, g in zip(ends, upstream, strict=True) if end.requires_grad]
            grads: Any = [None] * len(inputs)
            if pairs:
                roots, gs = zip(*pairs, strict=True)
                learned = [i for i in inputs if i.requires_grad]
                with asked:
                    found = iter(graph.gradients(roots, learned, gs))
                grads = [next(found) if i.requires_grad else None for i in inputs]
        reach = find_reach(ends, upstream, inputs)
    except NotRead:
        raise
    except Exception as error:
        if recorder.error is not None:
            raise recorder.error from error
        text = str(error).strip().partition("\n")[0]
        if "in-place operation" in text:  # of a leaf
            raise NotRead(
                "changes in place what it is given: write h = h + x for h += x"
            ) from error
        raise NotRead(f"could not be traced: {type(error).__name__}: {text}"[:200]) from error
    if recorder.error is not None:
        raise recorder.error
    return recorder, [*ends, *grads], reach


def find_reach(ends: Any, upstream: Any, inputs: Any) -> tuple[tuple[bool, ...], ...]:
    """Of which inputs each result alone has gradients, be they 0."""
    learned, ways = [i for i in inputs if i.requires_grad], []
    for end, g in zip(ends, upstream, strict=True):
        grads: Any = [None] * len(learned)
        if end.requires_grad:
            grads = graph.gradients((end,), learned, (g,))
        found = iter(grads)
        ways.append(tuple(i.requires_grad and next(found) is not None for i in inputs))
    return tuple(ways)
