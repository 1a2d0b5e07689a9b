"""Read a neuron's step: torch traces and differentiates it; what is pointwise becomes lines.

A value of the traced graph belongs to one of four kinds. A *number* depends on no tensor. What
depends on parameters alone is an *operand*: torch computes it once a call. What depends on the
input, a state or a gradient is a *neuron*'s, and must come from pointwise operations. A *total* is
a sum over neurons, or is computed from such sums: parameters' gradients are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import add, mul, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..bits import LARGEST_COUNT
from .program import (
    MOST_CONSTANTS,
    MOST_OPERANDS,
    MOST_TOTALS,
    Formulas,
    NotRead,
    Program,
    Reading,
)
from .trace import DTYPES, Call, Opaque, Step, Trace, trace_step


def read(step: Step, states: int, parameters: Sequence[Tensor], shape: Sequence[int]) -> Reading:
    """Read a step of ``states`` and ``parameters`` for an input of this ``shape`` ``[N, *]``.

    Only the number of axes counts, and with tensors of several values the size of axis 1.

    Raises:
        NotRead: the step is not pointwise, or not a function of its arguments alone.
    """

    def read_once(shape: Any, dtype: torch.dtype) -> tuple[Reading, bool]:
        trace = trace_step(step, states, parameters, shape, dtype)
        return read_trace(trace, states, shape), trace.asks_dtype

    return read_alike(read_once, odd_shapes(shape, any(p.numel() != 1 for p in parameters)))


def read_alike(read_once: Callable[..., tuple[Reading, bool]], shapes: Sequence[Any]) -> Reading:
    """The one reading for two shapes and, if the step asks for the dtype, for each of these."""
    (first, asks_dtype), (second, _) = (read_once(shape, torch.float32) for shape in shapes)
    if first != second:
        raise NotRead("depends on the shape of its input")
    for dtype in DTYPES[1:] if asks_dtype else ():
        other, _ = read_once(shapes[0], dtype)
        near = map(partial(math.isclose, rel_tol=0.02), first.constants, other.constants)
        if not all(near) or other._replace(constants=first.constants) != first:
            raise NotRead("depends on the dtype of its input")
    return first


def odd_shapes(
    shape: Sequence[int], per_channel: bool, but: Sequence[int] = ()
) -> list[tuple[int, ...]]:
    """Two shapes of as many axes, in which a transposition and a size that is a constant show."""
    found = []
    for odd in ((3, 5, 7, 9, 11, 13), (2, 17, 4, 6, 19, 8)):
        channels = shape[1:2] if per_channel else odd[1:2]
        others = [size for size in odd if size not in (*channels, *but)] * 3
        found.append((others[0], *channels, *others[1:])[: len(shape)])
    return found


def read_trace(trace: Trace, states: int, shape: Any) -> Reading:
    """What a trace of a step of so many states, for an input of this shape, is read as."""
    reader, ends = _Reader(trace.given, tuple(shape)), trace.ends
    for call in trace.calls:
        try:
            reader.take(call)
        except (RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise NotRead(f"has {call.name}, which is not understood") from error
    outputs = [reader.root(end) for end in ends[: 1 + states]]
    grads = [reader.root(end) for end in ends[1 + states : 2 + 2 * states]]
    return reader.reading(outputs, grads, trace.reach, ends[2 + 2 * states :])


class _Value(NamedTuple):
    kind: str  #: "number", "operand", "neuron" or "total"
    name: Any  #: of a neuron's, or in formulas; or the number
    dtype: torch.dtype
    shape: tuple[int, ...]
    mask: str = ""  #: the neurons that it has values of, if not all


#: operations that leave a neuron's values as they are, of one step with or without an axis of time
_SAME = frozenset(
    (
        *("alias", "detach", "clone", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze"),
        *("expand", "select", "slice", "contiguous", "select_backward", "slice_backward"),
        *("lift_fresh", "lift_fresh_copy", "unbind", "stack", "cat"),
    )
)
#: operations that make numbers: where their value is, or the value; ``None`` until it is set
FULL: dict[str, int | float | None] = {
    "empty": None, "empty_like": None, "empty_strided": None, "new_empty": None,
    "full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0, "fill": 1, "zero": 0.0,
    "_efficientzerotensor": 0.0, "zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0,
    "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0,
}  # fmt: skip
_TAKES_VALUE = ("full", "full_like", "new_full", "scalar_tensor", "fill")
#: operations that are linear, as gradients of parameters must be: a sum of theirs is one of its sum
_LINEAR = (
    frozenset(["sum", "neg", "add", "sub", "mul", "div", "permute", "transpose", "t", "_to_copy"])
    | _SAME
)
_COMPARE = frozenset(["ge", "gt", "le", "lt", "eq", "ne"])
_LOGIC = {"logical_and": "and", "bitwise_and": "and", "logical_or": "or", "bitwise_or": "or"}
_LOGIC |= {"logical_not": "not", "bitwise_not": "not", "logical_xor": "ne", "bitwise_xor": "ne"}
#: operations of one value to several, and how many arguments they have
_PLAIN = {
    "mul": 2, "neg": 1, "abs": 1, "sqrt": 1, "exp": 1, "log": 1, "sigmoid": 1, "tanh": 1,
    "sin": 1, "cos": 1, "erf": 1, "round": 1, "floor": 1, "ceil": 1, "trunc": 1, "sign": 1,
    "sgn": 1, "relu": 1, "reciprocal": 1, "rsqrt": 1, "minimum": 2, "maximum": 2, "atan": 1,
    "sigmoid_backward": 2, "tanh_backward": 2, "threshold_backward": 3, "expm1": 1, "log1p": 1,
}  # fmt: skip
#: operations with a method of the reader; it gives "" where it does not know them so
_METHODS = {
    **dict.fromkeys(("add", "sub", "rsub"), "_add"),
    **dict.fromkeys(("where", "masked_fill"), "_choose"),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh"), "_clamp"),
    **dict.fromkeys(("addcmul", "addcdiv"), "_add_product"),
    **{"index_put": "_put", "pow": "_power", "div": "_divide"},
}
_MOST = torch.finfo(torch.float32).max
#: operations of several lines: of what makes a line of names and numbers, and of their arguments
_COMPOSED: dict[str, Callable[..., str]] = {
    "softplus": lambda line, x, beta=1, limit=20: line(
        *("where", line("gt", z := line("mul", x, beta), limit)),
        *(x, line("div", line("log1p", line("exp", z)), beta)),
    ),
    "softplus_backward": lambda line, g, x, beta, limit: line(
        *("where", line("gt", z := line("mul", x, beta), limit)),
        *(g, line("div", line("mul", g, z := line("exp", z)), line("add", z, 1))),
    ),
    "leaky_relu": lambda line, x, slope=0.01: line(
        "where", line("gt", x, 0), x, line("mul", x, slope)
    ),
    "leaky_relu_backward": lambda line, g, x, slope, _: line(
        "where", line("gt", x, 0), g, line("mul", g, slope)
    ),
    "hardtanh_backward": lambda line, g, x, low, high: line(
        "where", line("and", line("gt", x, low), line("lt", x, high)), g, 0
    ),
    "hardsigmoid": lambda line, x: line(
        "over", line("at_most", line("at_least", line("add", x, 3), 0), 6), 6, 1 / 6
    ),
    "hardsigmoid_backward": lambda line, g, x: line(
        "where", line("and", line("gt", x, -3), line("lt", x, 3)), line("mul", g, 1 / 6), 0
    ),
    "lerp": lambda line, a, b, w: line(
        *("add", line("where", near := line("lt", line("abs", w), 0.5), a, b)),
        line("scale", line("where", near, w, line("sub", w, 1)), line("sub", b, a)),
    ),
    "isnan": lambda line, x: line("ne", x, x),
    "isinf": lambda line, x: line("eq", line("abs", x), math.inf),
    "nan_to_num": lambda line, x, nan=None, high=None, low=None: line(
        *("where", line("ne", x, x), nan or 0),
        line(
            *("where", line("eq", x, math.inf), high or _MOST),
            line("where", line("eq", x, -math.inf), low or -_MOST, x),
        ),
    ),
}
_SAME_AS = {
    "sgn": "sign",
    "true_divide": "div",
    "multiply": "mul",
    "divide": "div",
    "subtract": "sub",
}
#: operations that are torch's to rounding alone; torch may round "scale" and a sum after it once
_ROUNDED = frozenset(
    [
        "exp",
        "log",
        "sigmoid",
        "tanh",
        "sin",
        "cos",
        "erf",
        "atan",
        "pow",
        "expm1",
        "log1p",
        "sqrt",
        "rsqrt",
        "scale",
    ]
)


#: stands for a tensor that is given, among those in one memory
_GIVEN = -1


class _Reader:
    """Gives each value its kind, each of a neuron's a line, each of a parameter's a formula."""

    def __init__(self, given: dict[str, Tensor], shape: tuple[int, ...]) -> None:
        self.shapes = shape, (1, *shape)  # of a step, and of a sequence of one
        self.dtype = given["x"].dtype  # which is float32 in all that is read
        self.values: dict[int, Any] = {}
        self.lines: list[tuple[str, tuple[str, ...]]] = []
        self.ranges: dict[str, _Range] = {}
        self.constants: list[float] = []
        self.operands: list[_Value] = []
        self.totals: list[tuple[_Value, str]] = []
        self.formulas: dict[str, tuple[str, list[str]]] = {}
        self.parameters = [name for name in given if name[0] == "w"]
        self.aliases: dict[int, set[int]] = {}
        for name, tensor in given.items():
            kind = "operand" if name[0] == "w" else "neuron"
            self.values[id(tensor)] = self._value(kind, name, tensor)
            self._alias(tensor).add(_GIVEN)

    def _dtype(self, dtype: Any) -> Any:
        return torch.float32 if dtype == self.dtype else dtype

    def _value(self, kind: str, name: Any, tensor: Tensor, mask: str = "") -> _Value:
        return _Value(kind, name, self._dtype(tensor.dtype), tuple(tensor.shape), mask)

    def _alias(self, tensor: Tensor) -> set[int]:
        """The tensors in a tensor's memory."""
        values = tensor.values if isinstance(tensor, Opaque) else tensor
        return self.aliases.setdefault(values.untyped_storage()._cdata, set())

    def of(self, tensor: Tensor) -> _Value:
        if (value := self.values.get(id(tensor))) is None:
            raise NotRead("reads a tensor that is no parameter, buffer, state or attribute of it")
        if value.name is None:
            raise NotRead("reads memory that it has not set, as of torch.empty")
        return value

    def take(self, call: Call) -> None:
        """Understand one operation."""
        name = call.name
        in_place = name[-1] == "_" and name[0] != "_"
        shown: set[int] = self._alias(call.args[0]) if in_place else set()
        known = [self.values[other] for other in shown - {_GIVEN}]
        if _GIVEN in shown or any(value.kind == "operand" for value in known):
            raise NotRead(
                f"changes in place what it is given ({name}): write h = h * 2 for h.mul_(2)"
            )
        size = call.args[0].numel() if in_place else 0
        if any(math.prod(value.shape) != size for value in known) or "out" in call.kwargs:
            raise NotRead(f"changes a part of a tensor in place ({name})")
        base = name.rstrip("_") if in_place else name
        if "dtype" in call.kwargs:
            call = call._replace(kwargs=call.kwargs | {"dtype": self._dtype(call.kwargs["dtype"])})
        value = self._understand(call, _SAME_AS.get(base, base))
        for result in call.results:
            self.values[id(result)] = value
            self._alias(result).add(id(result))
            for other in shown:  # views of one step are the whole of it
                self.values[other] = value._replace(shape=self.values[other].shape)

    def _understand(self, call: Call, base: str) -> _Value:
        result = call.result
        tensors = tensors_of(call)
        if base in FULL:
            number: Any = FULL[base]
            number = call.args[number] if base in _TAKES_VALUE else number
            if isinstance(number, Tensor):
                raise NotRead(f"has {base} of a tensor")
            if number is not None and not result.dtype.is_floating_point:
                number = torch.full((), number, dtype=result.dtype, device="cpu").item()
            return self._value("number", number, result)
        if torch.Tag.nondeterministic_seeded in call.function.tags:
            raise NotRead(f"has random numbers ({base})")
        if call.number is not None and not (tensors and id(tensors[0]) in self.values):
            return self._value("number", call.number, result)
        if base == "_local_scalar_dense":
            if self.of(tensors[0]).kind == "number" and not isinstance(tensors[0], Opaque):
                return self.of(tensors[0])  # of a number that the step made a tensor of
            raise NotRead("asks for a value of a tensor: torch.where takes the place of if")
        is_made = isinstance(result, Tensor | list | tuple) and tensors
        if not is_made or call.function.namespace != "aten":
            raise NotRead(f"has {base}, which is no function of what it is given")
        kinds = {self.of(tensor).kind for tensor in tensors}
        if {"total", "neuron"} <= kinds:
            raise NotRead("mixes neurons: it has a sum over them")
        if "neuron" in kinds:
            return self._sum(call) if base == "sum" else self._of_neuron(call, base)
        if kinds == {"number"}:
            return self._fold(call, base)
        return self._of_parameters(call, base, "total" if "total" in kinds else "operand")

    def _fold(self, call: Call, base: str) -> _Value:
        """An operation on numbers, by torch."""
        result = call.result[0] if isinstance(call.result, list | tuple) else call.result
        if base in _SAME:
            first, *others = map(self.of, tensors_of(call))
            if result.numel() and all(other.name == first.name for other in others):
                return first._replace(shape=tuple(result.shape))
            raise NotRead(f"has {base} of constants, which is not pointwise")

        def number(tensor: Tensor) -> Tensor:
            value = self.of(tensor)
            return torch.tensor(value.name, dtype=value.dtype, device="cpu")

        args, kwargs = tree_map_only(Tensor, number, (call.args, call.kwargs))
        if torch.Tag.pointwise not in call.function.tags and base != "_to_copy":
            raise NotRead(f"has {base} of constants, which is not pointwise")
        found = call.function(*args, **kwargs)
        return self._value("number", found.item(), result)

    def _of_parameters(self, call: Call, base: str, kind: str) -> _Value:
        """What torch computes, once a call: not at the size of the input."""
        result = call.result
        if not isinstance(result, Tensor):
            raise NotRead(f"has {base} of parameters")
        tensors = tensors_of(call)
        shape, first = tuple(result.shape), self.of(tensors[0])
        is_whole = any(tuple(t.shape) != self.of(t).shape for t in tensors)
        if result.numel() > 1 and shape in self.shapes:
            if base == "expand" and kind == "operand":
                return first  # the kernel spreads it
            is_whole = True
        if is_whole:
            raise NotRead("computes something of parameters alone at the size of its input")
        if base in ("detach", "alias"):
            return first
        if kind == "total" and not self._is_linear(call, base):
            raise NotRead(f"has a gradient of a parameter that is not linear ({base})")
        name, uses = f"v{len(self.formulas)}", []

        def text(arg: Any) -> str:
            if isinstance(arg, Tensor):
                value = self.of(arg)
                if value.kind == "number":
                    return f"full({value.shape}, {text(value.name)}, dtype={value.dtype})"
                uses.append(value.name)
                return value.name
            if isinstance(arg, list | tuple):
                return f"[{', '.join(map(text, arg))}]"
            return f"float('{arg}')" if isinstance(arg, float) else repr(arg)

        kwargs = {
            k: v for k, v in call.kwargs.items() if k not in ("device", "layout", "pin_memory")
        }
        given = [*map(text, call.args), *(f"{k}={text(v)}" for k, v in kwargs.items())]
        self.formulas[name] = f"{call.function}({', '.join(given)})", uses
        return self._value(kind, name, result)

    def _is_linear(self, call: Call, base: str) -> bool:
        """Whether an operation on sums is linear in them."""
        values = [self.of(a) if isinstance(a, Tensor) else None for a in call.args]
        are_totals = [value is not None and value.kind == "total" for value in values]
        if base in ("add", "sub"):
            return all(are_totals)
        if base == "mul" or base.endswith("_backward"):
            return are_totals.count(True) == 1 and (base == "mul" or are_totals[0])
        if base == "where":
            zeros = (v is not None and v[:2] == ("number", 0) for v in values[1:])
            return not are_totals[0] and all(map(or_, are_totals[1:], zeros))
        if base == "masked_fill":
            return values[1] is not None and not are_totals[1] and call.args[2] == 0
        return base in _LINEAR and not (base == "div" and (are_totals[1] or call.kwargs))

    def _sum(self, call: Call) -> _Value:
        value, shape = self.of(call.args[0]), tuple(call.args[0].shape)
        dims: Any = call.args[1] if len(call.args) > 1 and call.args[1] else range(len(shape))
        summed = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}
        channel = len(shape) - len(self.shapes[0]) + 1
        kept = {axis for axis, size in enumerate(shape) if axis not in summed and size != 1}
        is_float = self._dtype(call.result.dtype) == torch.float32
        if shape not in self.shapes or kept - {channel} or not is_float or value.mask:
            raise NotRead("sums over some axes of its input")
        if len(self.totals) >= MOST_TOTALS:
            raise NotRead(f"has more than {MOST_TOTALS} sums over neurons")
        total = self._value("total", f"total{len(self.totals)}", call.result)
        self.totals.append((total, self._float(call.args[0])))
        return total

    # -- a neuron's

    def _of_neuron(self, call: Call, base: str) -> _Value:
        result = call.result
        if base in _SAME:
            first = call.args[0]
            results = result if isinstance(result, list | tuple) else [result]
            sources = first if isinstance(first, list | tuple) else [first]
            shapes = {tuple(t.shape) for t in (*results, *sources)}
            if len(results) == len(sources) == 1 and shapes <= set(self.shapes):
                return self.of(sources[0])._replace(shape=tuple(results[0].shape))
            raise NotRead(f"has {base}, which is not pointwise")
        if base == "index":
            return self._masked(call)
        masks = {v.mask for v in map(self.of, tensors_of(call)) if v.kind == "neuron"}
        mask = "" if base == "index_put" else masks.pop()
        is_whole = isinstance(result, Tensor) and tuple(result.shape) in self.shapes
        if not (is_whole or mask) or (masks and base != "index_put"):
            raise NotRead(f"has {base}, which is not pointwise")
        if self._dtype(result.dtype) not in (torch.float32, torch.bool):
            raise NotRead(f"computes in {str(result.dtype).removeprefix('torch.')}")
        name = self._pointwise(call, base)
        return self._value("neuron", name, result, mask)

    def _masked(self, call: Call) -> _Value:
        """The values of some neurons, as ``x[x > 1]``."""
        whole, (chosen, *others) = call.args
        if others or chosen is None or self.of(chosen).dtype != torch.bool or self.of(whole).mask:
            raise NotRead("has an index that is no condition on its input or states")
        if self.of(chosen).kind != "neuron" or tuple(chosen.shape) != tuple(whole.shape):
            raise NotRead("has an index that is no condition on its input or states")
        shape = tuple(call.result.shape)
        return self.of(whole)._replace(kind="neuron", mask=self._bool(chosen), shape=shape)

    def _put(self, base: str, args: Any, kwargs: Any) -> str:
        """Values put in the place of some neurons', as ``y[x > 1] = 0``."""
        whole, chosen, values = args[:3]
        if len(chosen) != 1 or tuple(chosen[0].shape) != tuple(whole.shape):
            raise NotRead("sets values at an index that is no condition on its input or states")
        mask, value = self._bool(chosen[0]), self.of(values)
        fits = value.mask == mask or value.kind == "number" or values.numel() == 1
        if value.mask not in ("", mask) or not fits:
            raise NotRead("sets values at an index that is no condition on its input or states")
        found, before = self._float(values), self._float(whole)
        if any(args[3:]):  # added to what is there
            found = self._line("add", before, found)
        return self._line("where", mask, found, before)

    def _pointwise(self, call: Call, base: str) -> str:
        args, kwargs, dtype = call.args, call.kwargs, self._dtype(call.result.dtype)
        if dtype == torch.bool and base == "mul":
            base = "logical_and"
        if dtype == torch.bool and base not in (*_COMPARE, *_LOGIC, "_to_copy", "isnan", "isinf"):
            raise NotRead(f"has {base} of truth values: .to(x) makes numbers of them")
        if base in _COMPARE:
            return self._line(base, *(self._float(a) for a in args[:2]))
        if base in _LOGIC:
            return self._line(_LOGIC[base], *(self._bool(a) for a in args))
        if base == "_to_copy":
            return self._cast(self.of(args[0]), dtype)
        if (method := _METHODS.get(base)) and (name := getattr(self, method)(base, args, kwargs)):
            return name
        if base in _COMPOSED:
            given = [a if a is None else self._float(a) for a in args]
            return _COMPOSED[base](self._line_of, *given)
        changes = kwargs.get("rounding_mode") or kwargs.get("decimals")
        if base in _PLAIN and not changes:
            return self._line(base, *(self._float(a) for a in args[: _PLAIN[base]]))
        raise NotRead(f"has {base}, which is not pointwise or not known")

    def _cast(self, value: _Value, dtype: torch.dtype) -> str:
        if value.dtype == dtype:
            return value.name
        if dtype == torch.float32:
            return self._line("float", value.name)
        return self._line("ne", value.name, "0")

    def _choose(self, base: str, args: Any, kwargs: Any) -> str:
        if base == "where" and len(args) != 3:
            return ""
        condition, yes, no = args if base == "where" else (args[1], args[2], args[0])
        return self._line("where", self._bool(condition), self._float(yes), self._float(no))

    def _add(self, base: str, args: Any, kwargs: Any) -> str:
        first, second = (self._float(a) for a in (args[:2] if base != "rsub" else args[1::-1]))
        alpha = args[2] if len(args) > 2 else kwargs.get("alpha", 1)
        if alpha != 1:
            second = self._line("scale", second, self._float(alpha))
        return self._line("add" if base == "add" else "sub", first, second)

    def _add_product(self, base: str, args: Any, kwargs: Any) -> str:
        whole, first, second = map(self._float, args)
        if kwargs.get("value", 1) != 1:
            first = self._line("scale", self._float(kwargs["value"]), first)
        product = self._line("scale" if base == "addcmul" else "div", first, second)
        return self._line("add", whole, product)

    def _divide(self, base: str, args: Any, kwargs: Any) -> str:
        """Of a number, "over" has its reciprocal too, by which torch multiplies on CUDA."""
        mode, (whole, part) = kwargs.get("rounding_mode"), args
        if mode not in (None, "trunc"):
            return ""
        if isinstance(part, Tensor) and self.of(part).kind == "number" and part.dim() == 0:
            part = self.of(part).name  # on the CPU, as torch.tensor makes it
        found = [self._float(whole), self._float(part)]
        if not isinstance(part, Tensor):
            number = torch.tensor(part, dtype=torch.float32, device="cpu")
            found.append(self._constant(number.reciprocal().item()))
        name = self._line("div" if isinstance(part, Tensor) else "over", *found)
        return self._line("trunc", name) if mode else name

    def _clamp(self, base: str, args: Any, kwargs: Any) -> str:
        low = args[1] if len(args) > 1 else kwargs.get("min", kwargs.get("min_val"))
        high = args[2] if len(args) > 2 else kwargs.get("max", kwargs.get("max_val"))
        if base == "clamp_max":
            low, high = None, args[1]
        name = self._float(args[0])
        for bound, of_number, of_tensor in (
            (low, "at_least", "maximum"),
            (high, "at_most", "minimum"),
        ):
            if isinstance(bound, Tensor):  # which may be NaN
                name = self._line(of_tensor, name, self._float(bound))
            elif bound is not None:
                name = self._line(of_number, name, self._float(bound))
        return name

    def _power(self, base: str, args: Any, kwargs: Any) -> str:
        if isinstance(args[1], Tensor):
            return self._line("pow", *map(self._float, args))
        x, exponent = self._float(args[0]), args[1]
        if exponent in (2, -2, 3):
            square = self._line("mul", x, x)
            if exponent == 3:
                return self._line("mul", square, x)
            return square if exponent == 2 else self._line("reciprocal", square)
        known = {1: "", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
        if exponent in known:
            return self._line(known[exponent], x) if known[exponent] else x
        return self._line("pow", x, self._float(exponent))

    def _line_of(self, op: str, *args: Any) -> str:
        """A line of names and numbers."""
        return self._line(op, *(a if isinstance(a, str) else self._constant(a) for a in args))

    def _line(self, op: str, *args: str) -> str:
        op = _SAME_AS.get(op, op)
        self.lines.append((op, args))
        name = f"t{len(self.lines) - 1}"
        ranges = [self._range(a) for a in args]
        found = _range_of(op, ranges)
        is_zero = op == "sub" and args[0] == args[1]  # as surrogates write 0, or NaN
        if is_zero or (op == "mul" and any(r is not None and not any(r[:2]) for r in ranges)):
            found = _Range(0.0, 0.0, True, any(r is None or r.has_nan for r in ranges))
        if found is not None:
            self.ranges[name] = found
        return name

    # -- arguments

    def _float(self, arg: Any) -> str:
        """The name of a float: a neuron's, an operand or a constant."""
        if not isinstance(arg, Tensor):
            return self._constant(arg)
        value = self.of(arg)
        if value.kind == "number":
            return self._constant(value.name)
        if value.kind == "operand":
            return self._operand(value)
        if value.kind == "total":
            raise NotRead("mixes neurons: it has a sum over them")
        return self._line("float", value.name) if value.dtype == torch.bool else value.name

    def _bool(self, arg: Any) -> str:
        value = self.of(arg) if isinstance(arg, Tensor) else None
        if value is not None and value.kind == "number":
            return "TRUE" if value.name else "FALSE"
        if value is None or value.kind != "neuron":
            raise NotRead("has a condition on parameters alone")
        return value.name if value.dtype == torch.bool else self._line("ne", value.name, "0")

    def _constant(self, number: Any) -> str:
        if not isinstance(number, int | float):
            raise NotRead(f"has a constant that is no number but a {type(number).__name__}")
        if type(number) is int and number in (0, 1):
            return str(number)
        if number == 0 and math.copysign(1, number) < 0:  # equal to 0.0, and another structure
            return self._line("neg", "0")
        if len(self.constants) >= MOST_CONSTANTS:
            raise NotRead(f"has more than {MOST_CONSTANTS} constants")
        self.constants.append(float(number))
        return f"c{len(self.constants) - 1}"

    def _operand(self, value: _Value) -> str:
        axes = len(self.shapes[0])
        shape = ((1,) * (axes + 1) + value.shape)[-axes:]
        others = [size for axis, size in enumerate(shape) if axis != 1]
        if value.dtype != torch.float32 or any(size != 1 for size in others):
            raise NotRead("has a parameter that is neither a number nor one per channel")
        if value not in self.operands:
            if len(self.operands) >= MOST_OPERANDS:
                raise NotRead(f"has more than {MOST_OPERANDS} values of parameters")
            self.operands.append(value)
        return f"p{self.operands.index(value)}"

    def root(self, end: Any) -> str:
        """The name of a result."""
        return "0" if end is None else self._float(end)

    # -- whole numbers

    def _range(self, name: str) -> _Range | None:
        if name[0] == "c":
            number = self.constants[int(name[1:])]
            is_finite = math.isfinite(number)
            return _Range(number, number, number.is_integer()) if is_finite else None
        if name in ("0", "1"):
            return _Range(float(name), float(name), True)
        return self.ranges.get(name)

    def reading(
        self, outputs: list[str], grads: list[str], reach: Any, of_parameters: list[Any]
    ) -> Reading:
        """All of it, with what belongs to parameters as functions of torch."""
        sums = tuple(name for _, name in self.totals)
        program = Program(tuple(self.lines), tuple(outputs), tuple(grads), sums, reach)
        low, high, is_whole, has_nan = self._range(outputs[0]) or _Range(0.0, 0.0, False)
        high += high - low == 1 and (low < 0 or has_nan)  # one bit has no sign, and no NaN
        known = is_whole and 0 < high - low <= LARGEST_COUNT
        least, most = (int(low), int(high)) if known else (None, None)
        exact = not any(program.lines[i][0] in _ROUNDED for i in program.needed(outputs))
        per_channel: Any = [
            tuple(math.prod(value.shape) != 1 for value in values)
            for values in (self.operands, [total for total, _ in self.totals])
        ]
        formulas, size = self._formulas(of_parameters), len(of_parameters)
        about: Any = tuple(self.constants), formulas, size, *per_channel, least, most, exact
        return Reading(program, *about)

    def _formulas(self, ends: list[Any]) -> Formulas:
        values = [None if end is None else self.of(end) for end in ends]
        for value in values:
            if value is not None and value.kind == "neuron":
                raise NotRead("has a gradient of a parameter at the size of its input")
            if value is not None and value.kind != "total" and value[:2] != ("number", 0):
                raise NotRead("has a gradient of a parameter that is not linear (a constant)")
        names: list[Any] = [None if v is None else v.name for v in values]
        for k, value in enumerate(values):
            if value is not None and value.kind == "number":  # 0, at each step
                names[k] = f"zero{k}"
                self.formulas[names[k]] = f"full({value.shape}, 0.0)", []
        return Formulas(
            tuple((name, text, tuple(uses)) for name, (text, uses) in self.formulas.items()),
            tuple(self.parameters),
            tuple(value.name for value in self.operands),
            tuple(total.name for total, _ in self.totals),
            tuple(names),
            tuple(total.shape for total, _ in self.totals),
        )


def tensors_of(call: Call) -> list[Tensor]:
    found: list[Tensor] = []
    for arg in (*call.args, *call.kwargs.values()):
        parts = arg if isinstance(arg, list | tuple) else [arg]
        found += [part for part in parts if isinstance(part, Tensor)]
    return found


class _Range(NamedTuple):
    """The least and the most that values are."""

    low: float
    high: float
    is_whole: bool  #: whether all of them are whole numbers
    has_nan: bool = False  #: whether some may be NaN besides


def _range_of(op: str, ranges: list[Any]) -> _Range | None:
    """The range of what an operation gives, if that is known."""
    if op == "float":
        return _Range(0.0, 1.0, True)
    if op == "sign":
        return _Range(-1.0, 1.0, True)
    if op == "sub":
        return _range_of("add", [ranges[0], _range_of("neg", ranges[1:])])
    if op == "where":
        ranges = ranges[1:]
    known = [r for r in ranges if r is not None]
    if op in ("at_least", "at_most") and ranges[1] is not None:
        low, high, whole, has_nan = ranges[0] or _Range(-math.inf, math.inf, False, True)
        bound, _, is_whole, _ = ranges[1]
        pick: Any = max if op == "at_least" else min
        return _Range(pick(low, bound), pick(high, bound), whole and is_whole, has_nan)
    if len(known) < len(ranges) or not known:
        return None
    lows, highs, wholes, nans = zip(*known, strict=True)
    about = all(wholes), any(nans)
    if op == "where":
        return _Range(min(lows), max(highs), *about)
    if op in ("round", "floor", "ceil", "trunc"):
        pick = {"round": round, "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc}[op]
        if not math.isfinite(highs[0] - lows[0]):
            return None
        return _Range(float(pick(lows[0])), float(pick(highs[0])), True, nans[0])
    if op == "neg":
        return _Range(-highs[0], -lows[0], *about)
    if combine := {"add": add, "mul": mul}.get(op):
        ends = [combine(a, b) for a in (lows[0], highs[0]) for b in (lows[1], highs[1])]
        return _Range(min(ends), max(ends), *about)
    return None
